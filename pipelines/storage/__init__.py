"""Files: paths here and in stores, cache, shards, manifests, stage folders, fingerprints."""
