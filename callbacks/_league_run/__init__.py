"""How a ``League`` measures what each average costs, and what it says of them."""
