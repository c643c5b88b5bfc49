"""`python -m paligemma VERB …` is `paligemma VERB …`."""

import runpy

runpy.run_module("paligemma.cli.main", run_name="__main__")
