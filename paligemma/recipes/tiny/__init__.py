"""The recipes of the embedded models.

    python -m paligemma.recipes.tiny --work runs/tiny           by stages: vision.py, words.py, stages.py
    python -m paligemma.recipes.tiny.direct --work runs/tiny    in one piece: train.py, examples.py

Both make the tokenizer (vocabulary.py) and the mask auto-encoder (codes.py) first, keep their state in the work folder
and go on where they were interrupted. Options, seeds and held-out scores of the shipped weights stand in
`paligemma/assets/tiny/README.md`.
"""
