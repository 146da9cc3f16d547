"""The contract, one predicate a rule: `plan/checks.py` has their order."""
