"""How the elements of keys and values are kept: plain, QVG and QVG as released."""
