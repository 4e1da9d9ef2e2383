"""Configuration and recipes: what is read, what is refused, and how the refusal is worded."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from varkit.config import ConfigError, build, config, load_yaml, nearest, override, to_dict
from varkit.training.recipe import Recipe, find_recipe, load_recipe, make_recipe, recipe_values, shipped_recipes


@config
class Inner:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    flip: bool = False
    mode: Literal["no", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"inner.lr must be > 0; got {self.lr}")


@config
class Outer:
    steps: int
    inner: Inner = Inner()
    maybe: Inner | None = None
    sizes: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def refused(values: dict[str, Any], **options: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(Outer, values, **options)
    return str(caught.value)


# ---- building ---------------------------------------------------------------------------------------------------


def test_defaults_and_nesting() -> None:
    got = build(Outer, {"steps": 3, "inner": {"lr": 0.5}, "maybe": {}, "sizes": [1, 2], "options": {"a": {"b": 1}}})
    assert got == Outer(steps=3, inner=Inner(lr=0.5), maybe=Inner(), sizes=(1, 2), options={"a": {"b": 1}})
    with pytest.raises(FrozenInstanceError):
        got.steps = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        Outer(3)  # type: ignore[misc] - keywords only


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "0.0002", 0.0002])
def test_text_is_a_float_where_a_float_is_wanted(text: Any) -> None:
    assert build(Inner, {"lr": text}) == Inner(lr=2e-4)


def test_the_word_no() -> None:
    """YAML 1.1 reads `no` as false; a field that takes the word gets it, one that takes a bool gets false."""
    values = yaml.safe_load("{steps: 1, inner: {mode: no, flip: no}, maybe: {mode: no}, options: {mode: no}}")
    assert values["inner"]["mode"] is False
    got = build(Outer, values)
    assert got.inner.mode == "no" and got.inner.flip is False
    assert got.maybe is not None and got.maybe.mode == "no"
    assert got.options == {"mode": False}
    assert "inner.mode: input should be 'no' or 'bf16'; got True" in refused({"steps": 1, "inner": {"mode": True}})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"stps": 3, "steps": 1}, "unknown key stps (did you mean 'steps'?); valid keys here: folder, inner, maybe, "),
        ({"steps": 1, "inner": {"lrr": 3}}, "unknown key inner.lrr (did you mean 'lr'?); valid keys here: betas, flip"),
        ({"steps": 1, "maybe": {"beta": 3}}, "unknown key maybe.beta (did you mean 'betas'?); valid keys here: betas"),
        ({"steps": 1, "xyzzy": 3}, "unknown key xyzzy; valid keys here: folder"),
        ({}, "steps is required"),
        ({"steps": "many"}, "steps: input should be a valid integer, unable to parse string as an integer; got 'many'"),
        ({"steps": 2.5}, "steps: input should be a valid integer, got a number with a fractional part; got 2.5"),
        ({"steps": 1, "inner": {"lr": "fast"}}, "inner.lr: input should be a valid number"),
        ({"steps": 1, "inner": {"flip": "maybe"}}, "inner.flip: input should be a valid boolean"),
        ({"steps": 1, "inner": {"betas": [0.9, "x"]}}, "inner.betas.1: input should be a valid number"),
        ({"steps": 1, "inner": {"betas": [0.9]}}, "inner.betas.1 is required"),
        ({"steps": 1, "inner": {"mode": "fp8"}}, "inner.mode: input should be 'no' or 'bf16'; got 'fp8'"),
        ({"steps": 1, "inner": 3}, "inner: input should be a dictionary or an instance of Inner; got 3"),
        ({"steps": 1, "sizes": [1, None]}, "sizes.1: input should be a valid integer; got None"),
        ({"steps": 1, "inner": {"lr": -1}}, "inner.lr must be > 0; got -1.0"),
        ({"steps": 1, "maybe": {"lr": -1}}, "maybe: inner.lr must be > 0; got -1.0"),
        ({"steps": 1, 2: 3}, "2: keys should be strings; got 2"),
    ],
)
def test_refusals_name_the_key(values: dict[str, Any], line: str) -> None:
    text = refused(values)
    first, *lines = text.splitlines()
    assert first == "bad configuration:"
    assert len(lines) == 1 and lines[0].startswith(f"  {line}")
    if "must be > 0" in line:
        assert lines[0] == f"  {line}"  # what the class says, once, and no dump of the whole section


def test_all_bad_keys_are_named_at_once_with_source_and_prefix() -> None:
    text = refused({"inner": {"lr": "x", "btas": 1}, "szes": 1}, source="my.yaml", prefix="objective.")
    head, *lines = text.splitlines()
    assert head == "bad configuration in my.yaml:"
    assert len(lines) == 4
    for key in ("objective.inner.lr:", "unknown key objective.inner.btas", "unknown key objective.szes"):
        assert sum(key in line for line in lines) == 1
    assert "  objective.steps is required" in lines


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)


def test_nearest() -> None:
    assert nearest("lrr", ["lr", "betas"]) == " (did you mean 'lr'?)"
    assert nearest("zzz", ["lr", "betas"]) == nearest("x", []) == ""


# ---- overriding -------------------------------------------------------------------------------------------------


def test_override_reads_yaml_and_leaves_the_original_alone() -> None:
    values = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    before = json.dumps(values)
    got = override(
        values,
        ["a.b=[1, 2]", "a.c.d=true", "x.y.z=null", "e=0.5", "s=a=b", "t=2e-4", "empty=", "m={k: v}", "a.n=-3", "q='7'"],
    )
    assert got == {
        "a": {"b": [1, 2], "c": {"d": True}, "n": -3},
        "x": {"y": {"z": None}},
        "e": 0.5,
        "s": "a=b",
        "t": "2e-4",  # becomes a float where a float is wanted
        "empty": "",
        "m": {"k": "v"},
        "q": "7",
    }
    assert json.dumps(values) == before
    assert override(values, []) == values


def test_later_overrides_win() -> None:
    assert override({}, ["a.b=1", "a.b=2", "a.c=3"]) == {"a": {"b": 2, "c": 3}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", r"'optim.lr' is not key=value; write for instance optim.lr=2e-4"),
        ("=3", "'=3' is not key=value"),
        ("a.b.c=1", "a.b.c: b is a value, not a section"),
        ("a.b=[1, 2", r"a.b: '\[1, 2' cannot be read"),
    ],
)
def test_bad_overrides(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"a": {"b": 1}}, [text])


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold a mapping of keys to values; got list"),
        (b"", "must hold a mapping of keys to values; got NoneType"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "cannot be read"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),  # nothing is executed
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file: .*none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(tmp_path)


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("name: größe".encode())
    assert load_yaml(tmp_path / "a.yaml") == {"name": "größe"}


def test_to_dict_round_trip(tmp_path: Path) -> None:
    value = Outer(steps=3, maybe=Inner(lr=0.5, flip=True), sizes=(1, 2), options={"a": (1, 2)}, folder=tmp_path)
    plain = to_dict(value)
    assert json.loads(json.dumps(plain)) == yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert plain["options"] == {"a": [1, 2]} and plain["folder"] == str(tmp_path)
    assert to_dict(build(Outer, plain)) == plain
    assert build(Outer, plain).maybe == value.maybe


# ---- recipes ----------------------------------------------------------------------------------------------------

RECIPES = sorted(shipped_recipes())


def test_there_are_recipes() -> None:
    assert {"fashion_vq", "fashion_var", "fashion_classifier"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipe_loads(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.folder == Path("runs") / name
    assert make_recipe(yaml.safe_load(yaml.safe_dump(recipe_values(recipe)))) == recipe
    text = shipped_recipes()[name].read_text()
    assert text.startswith("# What: ") and "\n# Cost: " in text
    assert load_recipe(shipped_recipes()[name]) == recipe  # by path, too


@pytest.mark.parametrize("name", RECIPES)
def test_a_typo_anywhere_in_a_recipe_is_found(name: str) -> None:
    """Every section of every recipe, each known key misspelt in turn."""
    recipe = load_recipe(name)
    for section in ("objective", "data", "loop", "optim"):
        for known in fields(getattr(recipe, section)):
            wrong = known.name + "x"
            with pytest.raises(ConfigError) as caught:
                load_recipe(name, [f"{section}.{wrong}=1"])
            text = str(caught.value)
            assert f"unknown key {section}.{wrong} (did you mean '{known.name}'?)" in text
            assert str(shipped_recipes()[name]) in text
    with pytest.raises(ConfigError, match=r"unknown key lop \(did you mean 'loop'\?\)"):
        load_recipe(name, ["lop.steps=3"])


def base(**changes: Any) -> dict[str, Any]:
    return {
        "name": "x",
        "objective": {"name": "classifier"},
        "data": {"train": "somewhere"},
        "loop": {"steps": 10, "batch_size": 4},
    } | changes


def test_make_recipe() -> None:
    recipe = make_recipe(base(out="elsewhere"))
    assert isinstance(recipe, Recipe)
    assert recipe.folder == Path("elsewhere")
    assert recipe.objective.name == "classifier"


def test_overrides_reach_every_section() -> None:
    recipe = load_recipe(
        "fashion_classifier",
        ["optim.lr=2e-4", "objective.widths=[8, 16]", "loop.steps=7", "data.flip=false", "loop.precision=no", "out=o"],
    )
    assert recipe.optim.lr == 2e-4 and isinstance(recipe.optim.lr, float)
    assert recipe.objective.widths == (8, 16)
    assert (recipe.loop.steps, recipe.loop.precision, recipe.data.flip) == (7, "no", False)
    assert recipe.folder == Path("o")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop.steps=0", "loop.steps must be at least 1; got 0"),
        ("loop.batch_size=0", "loop.batch_size must be at least 1; got 0"),
        ("loop.accumulation=0", "loop.accumulation must be at least 1; got 0"),
        ("loop.log_every=0", "loop.log_every must be at least 1; got 0"),
        ("loop.keep=0", "loop.keep must be at least 1; got 0"),
        ("loop.validate_every=-1", r"loop.validate_every must not be negative \(0: never\); got -1"),
        ("loop.sample_every=-1", "loop.sample_every must not be negative"),
        ("loop.save_every=-1", "loop.save_every must not be negative"),
        ("loop.accumulation=3", "loop.batch_size 4 must be a multiple of loop.accumulation 3"),
        ("loop.ema_decay=1", r"loop.ema_decay must be in \[0, 1\); got 1"),
        ("loop.ema_decay=-0.1", r"loop.ema_decay must be in \[0, 1\); got -0.1"),
        ("loop.precision=fp8", "loop.precision: input should be 'no', 'bf16' or 'fp16'; got 'fp8'"),
        ("data.mode=crp", "data.mode: input should be 'crop'"),
        ("optim.lr=0", "optim.lr must be > 0; got 0"),
        ("optim.schedule=lim", "optim: unknown lr schedule 'lim'; choose constant, cos"),
        ("objective.name=clasifier", r"objective.name must be one of .*'clasifier' \(did you mean 'classifier'\?\)"),
        ("objective=classifier", "objective must be a section with a name"),
    ],
)
def test_bad_recipe_values(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_recipe(override(base(), [text]))


@pytest.mark.parametrize("key", ["loop.steps", "loop.batch_size", "data.train"])
def test_what_a_recipe_must_say(key: str) -> None:
    section, leaf = key.split(".")
    values = base()
    del values[section][leaf]
    with pytest.raises(ConfigError, match=f"{key} is required"):
        make_recipe(values)


def test_find_recipe_by_name_or_path() -> None:
    assert find_recipe("fashion_vq").name == "fashion_vq.yaml"
    assert find_recipe("my/own.yaml") == Path("my/own.yaml")
    with pytest.raises(ConfigError, match=r"'fashon_vq' \(did you mean 'fashion_vq'\?\); shipped: .*fashion_var"):
        find_recipe("fashon_vq")
    with pytest.raises(ConfigError, match=r"no such file: my/own\.yaml"):
        load_recipe("my/own.yaml")
