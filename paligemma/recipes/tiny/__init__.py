"""The recipe of the embedded models: python -m paligemma.recipes.tiny --work runs/tiny

Tokenizer (vocabulary.py) and mask auto-encoder (codes.py) first, then stage 0 (vision.py, words.py), stages 1 and 2
(stages.py), and the folder that is shipped (export.py). The state is kept in the work folder, and the same command goes
on where it was interrupted. What the shipped weights went through, and their held-out scores:
`paligemma/assets/tiny/README.md`.
"""
