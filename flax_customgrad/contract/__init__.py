"""How a hand-written gradient enters: `custom_vjp`, and what it checks."""
