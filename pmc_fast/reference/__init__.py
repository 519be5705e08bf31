"""Each op's definition in plain torch; every other implementation is held against these."""
