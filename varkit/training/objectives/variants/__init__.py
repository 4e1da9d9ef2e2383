"""Training objectives of other papers, as options on any discrete generator. `combined` joins them."""
