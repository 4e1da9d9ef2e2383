"""Speculative decoding: a drafter proposes tokens, the target looks at all of them in one pass, a verifier accepts."""
