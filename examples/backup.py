#!/usr/bin/env python3
"""Back up one VM with Virtmark and the stock ovirt-imageio client.

    backup.py --namespace vms db01 /backups/db01

What a backup product does, in the order in which it does it:

 1. create a VmBackup and wait until it is Ready,
 2. read each disk through its ImageTransfer: only extents with data cross the wire,
 3. finalize the backup, and wait for Succeeded: only then is its checkpoint a base.

If anything goes wrong in between, the backup is cancelled, so that the VM is not held.
Needs kubectl, and `pip install ovirt-imageio`.
"""

import argparse
import base64
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time

from ovirt_imageio import client


KUBECTL = ["kubectl"]


def kubectl(*args, stdin=None):
    done = subprocess.run([*KUBECTL, *args], input=stdin, check=True, text=True, stdout=subprocess.PIPE)
    return done.stdout


def get(kind, name):
    return json.loads(kubectl("get", kind, name, "-o", "json"))


def wait(kind, name, phase, seconds):
    """Waits for a phase. A Stalled object never gets there: say why, at once."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = get(kind, name).get("status", {})
        if status.get("phase") == phase:
            return status
        for condition in status.get("conditions", []):
            if condition["type"] == "Stalled" and condition["status"] == "True":
                raise RuntimeError(f"{kind} {name}: {condition['reason']}: {condition['message']}")
        time.sleep(0.1)
    raise RuntimeError(f"{kind} {name} was not {phase} within {seconds} s")


def ticket(transfer):
    """The bearer URL of a transfer, and the CA that signed its server. Never print the URL."""
    status = wait("imagetransfer", transfer, "Ready", 60)
    data = get("secret", status["ticketSecret"])["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


@contextlib.contextmanager
def running_backup(vm):
    """A Ready backup of `vm`, which is cancelled unless the block ends well."""
    manifest = {
        "apiVersion": "virtmark.dev/v1alpha1",
        "kind": "VmBackup",
        "metadata": {"name": f"{vm}-{time.strftime('%Y%m%d%H%M%S')}"},
        "spec": {"vm": vm, "startDeadlineSeconds": 600},
    }
    name = manifest["metadata"]["name"]
    kubectl("create", "-f", "-", stdin=json.dumps(manifest))
    try:
        yield name, wait("vmbackup", name, "Ready", 600)
    except BaseException:
        finish(name, "Cancelled")
        raise


def finish(name, state):
    kubectl("patch", "vmbackup", name, "--type=merge", "-p", json.dumps({"spec": {"state": state}}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vm", help="name of the LibvirtDomain (kubectl get lvd)")
    parser.add_argument("directory", help="where the images go")
    parser.add_argument("--namespace", "-n", default="default")
    parser.add_argument("--format", choices=["qcow2", "raw"], default="qcow2")
    parser.add_argument("--max-workers", type=int, default=4)
    args = parser.parse_args()

    os.makedirs(args.directory, exist_ok=True)
    KUBECTL.extend(["--namespace", args.namespace])
    with running_backup(args.vm) as (name, status):
        print(f"{name} is Ready on {status['nodeName']}")
        for disk in status["disks"]:
            transfer = f"{name}-{disk['name']}"
            secret = ticket(transfer)
            image = os.path.join(args.directory, f"{disk['name']}.{args.format}")
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as ca:
                ca.write(secret["ca.crt"])
                ca.flush()
                started = time.monotonic()
                client.download(
                    secret["url"], image, ca.name, fmt=args.format, max_workers=args.max_workers
                )
            print(f"{disk['name']}: {disk['size']} bytes to {image} in {time.monotonic() - started:.1f} s")
        finish(name, "Finalized")
        status = wait("vmbackup", name, "Succeeded", 60)
    print(f"{name} Succeeded; next time start from {status.get('toCheckpoint', 'a full backup')}")


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        sys.exit(f"backup failed: {error}")
