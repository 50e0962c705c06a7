"""An average by a rule, whoever tells it of steps: a callback, a loop of your own, another trainer."""
