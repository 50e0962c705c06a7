"""How a callback measures statistics of the weights, and how ``Anchor`` does."""
