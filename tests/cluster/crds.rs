//! The CRDs as a real API server takes them: good objects, bad objects, names, `kubectl explain`.

use anyhow::Result;
use serde_json::{Value, json};
use virtmark_bed::Bed;

fn dry(bed: &Bed, object: &Value) -> Result<String> {
    bed.kubectl().run_with(&["apply", "--dry-run=server", "-n", "vms", "-f", "-"], &object.to_string())
}

fn object(kind: &str, name: &str, spec: Value) -> Value {
    json!({"apiVersion": "virtmark.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

fn upload(volume: &str, size: u64) -> Value {
    json!({"direction": "Upload", "volume": {"nodeName": "n", "pool": "p", "name": volume, "size": size}})
}

#[test]
fn good_objects_are_taken_and_bad_ones_refused_with_words() -> Result<()> {
    let bed = Bed::from_env()?;
    let long = "x".repeat(181);
    let cases = [
        ("VmBackup", "ok", json!({"vm": "db01"}), None),
        ("VmBackup", "ok", json!({"vm": "db01", "disks": ["vda"], "quiesce": {"mode": "None"}}), None),
        ("VmBackup", "bad", json!({}), Some("spec.vm: Required")),
        ("VmBackup", "bad", json!({"vm": "DB_01"}), Some("spec.vm")),
        ("VmBackup", "bad", json!({"vm": "db01", "disks": []}), Some("at least 1")),
        ("VmBackup", "bad", json!({"vm": "db01", "disks": ["vda", "vda"]}), Some("Duplicate")),
        ("VmBackup", "bad", json!({"vm": "db01", "disks": ["../x"]}), Some("spec.disks")),
        ("VmBackup", "bad", json!({"vm": "db01", "type": "Differential"}), Some("Unsupported value")),
        ("VmBackup", "bad", json!({"vm": "db01", "maxCheckpoints": 0}), Some("maxCheckpoints")),
        ("VmBackup", "bad", json!({"vm": "db01", "offline": "Allow"}), Some("Unsupported value")),
        ("VmBackup", "bad", json!({"vm": "db01", "startDeadlineSeconds": 0}), Some("startDeadlineSeconds")),
        ("VmBackup", "bad", json!({"vm": "db01", "quiesce": {"timeoutSeconds": 61}}), Some("timeoutSeconds")),
        ("VmBackup", &long, json!({"vm": "db01"}), Some("at most 180")),
        ("ImageTransfer", "ok", json!({"backup": "b", "disk": "vda"}), None),
        ("ImageTransfer", "bad", json!({"backup": "b"}), Some("a download names a backup and a disk")),
        (
            "ImageTransfer",
            "bad",
            json!({"backup": "b", "disk": "vda", "direction": "Upload"}),
            Some("an upload names a new volume"),
        ),
        ("ImageTransfer", "ok", upload("db01-vda.qcow2", 512), None),
        ("ImageTransfer", "bad", upload("../../etc/passwd", 512), Some("spec.volume.name")),
        ("ImageTransfer", "bad", upload(".hidden", 512), Some("spec.volume.name")),
        ("ImageTransfer", "bad", upload("x", 513), Some("multiple of 512")),
        ("ImageTransfer", "bad", upload("x", 0), Some("spec.volume.size")),
        (
            "ImageTransfer",
            "bad",
            json!({"backup": "b", "disk": "vda", "format": "qcow2"}),
            Some("Unsupported"),
        ),
        ("VmCheckpoint", "bad", json!({"vm": "db01"}), Some("Required")),
        ("LibvirtDomain", "bad", json!({"uuid": "1"}), Some("spec.uuid")),
    ];
    for (kind, name, spec, refusal) in cases {
        let answer = dry(&bed, &object(kind, name, spec.clone()));
        match refusal {
            None => drop(answer?),
            Some(words) => {
                let error = answer.expect_err(&format!("{kind} {spec} was taken")).to_string();
                assert!(error.contains(words), "{kind} {spec}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_must_not_change_does_not() -> Result<()> {
    let bed = Bed::from_env()?;
    let kubectl = bed.kubectl();
    let name = "immutable";
    kubectl.run_with(
        &["apply", "-n", "vms", "-f", "-"],
        &object("VmBackup", name, json!({"vm": "nobody", "disks": ["vda"]})).to_string(),
    )?;
    let patch = |spec: Value| {
        let patch = json!({"spec": spec}).to_string();
        kubectl.run(&[
            "patch",
            "vmbackup",
            name,
            "-n",
            "vms",
            "--type=merge",
            "--dry-run=server",
            "-p",
            &patch,
        ])
    };
    for spec in [
        json!({"vm": "other"}),
        json!({"disks": ["vdb"]}),
        json!({"disks": null}),
        json!({"quiesce": {"mode": "None"}}),
        json!({"offline": "Refuse"}),
        json!({"transfers": "Manual"}),
    ] {
        let error = patch(spec.clone()).expect_err(&format!("{spec} was taken")).to_string();
        assert!(error.contains("immutable"), "{spec}: {error}");
    }
    for spec in [
        json!({"ttlSecondsAfterFinished": 5}),
        json!({"clientIdleSeconds": 5}),
        json!({"state": "Finalized"}),
    ] {
        patch(spec)?;
    }
    kubectl.run(&[
        "patch",
        "vmbackup",
        name,
        "-n",
        "vms",
        "--type=merge",
        "-p",
        r#"{"spec":{"state":"Cancelled"}}"#,
    ])?;
    for state in ["Running", "Finalized"] {
        let error = patch(json!({"state": state})).expect_err("it went back").to_string();
        assert!(error.contains("one way"), "{error}");
    }
    kubectl.run(&["delete", "vmbackup", name, "-n", "vms", "--timeout=30s"]).map(drop)
}

#[test]
fn every_example_is_taken() -> Result<()> {
    let bed = Bed::from_env()?;
    let examples = "examples";
    let mut taken = 0;
    for entry in std::fs::read_dir(examples)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            bed.kubectl().run(&["apply", "--dry-run=server", "-n", "vms", "-f", &path.to_string_lossy()])?;
            taken += 1;
        }
    }
    assert!(taken >= 3, "only {taken} examples were found");
    Ok(())
}

#[test]
fn names_columns_and_explanations_are_what_people_type_and_read() -> Result<()> {
    let bed = Bed::from_env()?;
    let kubectl = bed.kubectl();
    for (short, full) in [
        ("vmbk", "vmbackups.virtmark.dev"),
        ("vmcp", "vmcheckpoints.virtmark.dev"),
        ("imgt", "imagetransfers.virtmark.dev"),
        ("lvd", "libvirtdomains.virtmark.dev"),
    ] {
        kubectl.run(&["get", short, "-n", "vms"])?;
        kubectl.run(&["get", full, "-n", "vms"])?;
        assert!(kubectl.run(&["get", "virtmark", "-A", "--show-kind"]).is_ok(), "category virtmark");
    }
    let columns = kubectl.run(&[
        "get",
        "crd",
        "vmbackups.virtmark.dev",
        "-o",
        "jsonpath={.spec.versions[0].additionalPrinterColumns[*].name}",
    ])?;
    assert_eq!(columns, "VM Type Phase Reason Progress Checkpoint Node Age");
    let fields = kubectl.run(&[
        "get",
        "crd",
        "vmbackups.virtmark.dev",
        "-o",
        "jsonpath={.spec.versions[0].selectableFields[*].jsonPath}",
    ])?;
    assert_eq!(fields, ".spec.vm .status.nodeName");
    let explained = kubectl.run(&["explain", "vmbackup.spec.clientIdleSeconds"])?;
    assert!(explained.contains("neither migrated nor resized"), "{explained}");
    Ok(())
}
