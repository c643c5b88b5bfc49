"""Where examples come from; one file per format, each reads and, where that makes sense, writes."""
