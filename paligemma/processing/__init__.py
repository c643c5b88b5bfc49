"""Pictures and texts → Batch.

tokenizer.py   text ↔ ids          (vocabulary.py: the two file formats, spelling.py: bytes to characters)
image.py       picture → pixels
prompt.py      the one sequence layout and its masks
batch.py       sequences → rows of tensors, padded or packed
processor.py   Processor: the one call that does all of the above
"""
