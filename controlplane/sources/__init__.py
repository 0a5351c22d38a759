"""Where configuration comes from: folders of YAML, parsed once into the frozen objects of `model`."""
