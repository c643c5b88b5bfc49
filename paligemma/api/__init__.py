"""The Python front door: `load()` gives a `PaliGemma`, which captions, answers, detects, segments and reads.

loading.py   a name, folder or file → model + processor + mask decoder, streamed into place
model.py     PaliGemma: the verbs
raw.py       generate / stream / score beneath them
requests.py  verb → prompt, and generated text → typed result
encoded.py   EncodedImage: pictures that SigLIP has already seen
adapters.py  several beside one base, one chosen per request
"""

from paligemma.api.encoded import EncodedImage
from paligemma.api.loading import load
from paligemma.api.model import PaliGemma

__all__ = ["EncodedImage", "PaliGemma", "load"]
