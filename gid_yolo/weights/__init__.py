"""Looking at files of weights without opening them."""
