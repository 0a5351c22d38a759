"""Where configuration comes from: folders of YAML and Kubernetes' API server, parsed once into the frozen objects of `model`."""
