"""From the model to what goes over the wire: `istio.workload.Address`, and LDS, RDS, CDS, EDS per scope and destination."""
