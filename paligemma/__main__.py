"""`python -m paligemma VERB …` is `paligemma VERB …`."""

import sys

from paligemma.cli.main import main

sys.exit(main())
