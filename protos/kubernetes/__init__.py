"""The contract with Kubernetes' API server: what we read and write there, and how.

`resources` and `objects` are the data, `errors` what may fail, `configuration` where the server is and who we are, `stream` and
`reflector` the protocol of list and watch without I/O. Only `client` imports aiohttp (and `follow`, which drives a reflector by it):
import these two when Kubernetes is used, not before, since they cost memory on every node.
"""
