#!/usr/bin/env python3
"""Follow one VmBackup: a line for each change of its status, and for each Event about it.

    follow.py --namespace vms db01-monday

Ends with the backup: 0 when it succeeded, 1 otherwise. Needs kubectl only.
"""

import argparse
import json
import subprocess
import sys
import threading


def watch(namespace, *args):
    """The objects of a kubectl watch, one by one."""
    command = ["kubectl", "--namespace", namespace, "get", *args, "--watch", "--output-watch-events", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        decoder, text = json.JSONDecoder(), ""
        try:
            for line in process.stdout:
                text += line
                try:
                    event, _ = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    continue
                text = ""
                yield event["type"], event["object"]
        finally:
            process.terminate()


def follow_events(namespace, name):
    about = f"--field-selector=involvedObject.kind=VmBackup,involvedObject.name={name}"
    for _, event in watch(namespace, "events", about):
        print(f"event   {event['type']:8} {event['reason']}: {event['message']}", flush=True)


def follow_status(namespace, name):
    last = None
    for kind, backup in watch(namespace, "vmbackup", name):
        status = backup.get("status", {})
        ready = next((c for c in status.get("conditions", []) if c["type"] == "Ready"), {})
        line = f"status  {status.get('phase', '-'):12} {ready.get('reason', '-'):20} {status.get('progress', '')}"
        if line != last:
            print(line, flush=True)
            last = line
        if kind == "DELETED" or status.get("phase") in ("Succeeded", "Failed"):
            return status.get("phase")
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backup")
    parser.add_argument("--namespace", "-n", default="default")
    args = parser.parse_args()
    threading.Thread(target=follow_events, args=(args.namespace, args.backup), daemon=True).start()
    return 0 if follow_status(args.namespace, args.backup) == "Succeeded" else 1


if __name__ == "__main__":
    sys.exit(main())
