"""The recipe of the embedded model `tiny`: tokenizer, mask auto-encoder, model, from nothing, on CPU or GPU.

    python -m paligemma.recipes.tiny --work runs/tiny --minutes 120

Every stage keeps its state in the work folder and goes on where it was interrupted. Options, seeds and held-out scores
of the shipped weights stand in `paligemma/assets/tiny/README.md`.
"""
