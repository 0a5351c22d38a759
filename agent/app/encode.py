"""Entries of the store as blobs of the data path: the seam between the rooms state and dataplane."""
from __future__ import annotations

from collections.abc import Callable

from agent.dataplane import blobs
from agent.state.entries import (
    Drop,
    Entry,
    Put,
    PutCertificate,
    PutCluster,
    PutDestination,
    PutNote,
    PutPod,
    PutPolicy,
    PutResource,
    PutService,
    PutSettings,
    PutTrust,
    PutWorkload,
)


def encode(entry: Entry, service_index: Callable[[str], int]) -> blobs.Entry:
    """Raises blobs.BlobError when a value does not fit the format."""
    if isinstance(entry, Drop):
        return blobs.Delete(entry.key[0], entry.key[1])
    return encode_put(entry, service_index)


def encode_put(put: Put, service_index: Callable[[str], int]) -> blobs.Put:
    match put:
        case PutSettings(settings):
            return blobs.put_settings(settings)
        case PutWorkload(index, workload):
            return blobs.put_workload(index, workload, service_index)
        case PutService(index, service):
            return blobs.put_service(index, service)
        case PutDestination(destination):
            return blobs.put_destination(destination)
        case PutCluster(cluster):
            return blobs.put_cluster(cluster, service_index)
        case PutPod(uid, handle, workload_uid, scope, addresses, identity, excluded):
            return blobs.put_pod(uid, handle, workload_uid, scope, addresses, identity, excluded)
        case PutTrust(trust):
            return blobs.put_trust(trust)
        case PutCertificate(certificate):
            return blobs.put_certificate(certificate)
        case PutPolicy(policy):
            return blobs.put_policy(policy)
        case PutResource(type_url, name, version, body):
            return blobs.put_resource(type_url, name, version, body)
        case PutNote(name, body):
            return blobs.put_note(name, body)
