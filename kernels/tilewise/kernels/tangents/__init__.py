"""One derivative more: tangents of the forward (forward mode), and of the backward (second derivatives).

A dot is the derivative along a direction (Q̇, K̇, V̇ and those of parameters). docs/derivatives.md has the
equations and what derivatives of which order are made of them.
"""
