//! Why a backup is as it is, in sentences: why full, why slow, why it failed. Pure: it says what the object says, and never
//! guesses.

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;

use crate::api::{BackupType, DesiredState, DiskMode, Phase, VmBackup, conditions};
use crate::reason::Reason;

/// What is said of a backup at a time, a sentence each.
#[must_use]
pub fn backup(backup: &VmBackup, now: Timestamp) -> Vec<String> {
    let (name, spec) = (backup.name_any(), &backup.spec);
    let status = backup.status.clone().unwrap_or_default();
    let ready = conditions::get(&status.conditions, conditions::READY);
    let kind = spec.backup_type.as_str().to_lowercase();
    let mut said = vec![format!("{name} is a backup of VM {}, of type {kind}.", spec.vm)];
    said.push(match status.phase {
        Phase::Initializing => "It has not begun yet.".to_owned(),
        Phase::Ready | Phase::Paused if spec.state == DesiredState::Running => {
            "Its disks can be read; it waits for its client to read them and to finalize it.".to_owned()
        }
        Phase::Ready | Phase::Paused => "It was asked to end, and has not ended yet.".to_owned(),
        Phase::Finalizing => "It is ending: its node is being cleaned.".to_owned(),
        Phase::Succeeded => "It Succeeded: every byte that had to be read was read.".to_owned(),
        Phase::Failed | Phase::Cancelled => "It failed, and its checkpoint is removed.".to_owned(),
    });
    let seconds = |from: Timestamp, to: Timestamp| to.as_second().saturating_sub(from.as_second());
    if let Some(ready) = ready.filter(|_| status.phase != Phase::Succeeded) {
        said.push(format!("The reason is {}: {}.", ready.reason, ready.message.trim_end_matches('.')));
        if let Some(reason) = Reason::ALL.iter().find(|reason| reason.as_str() == ready.reason) {
            said.push(format!("That means: {}", reason.meaning()));
        }
    }
    for disk in &status.disks {
        let more = disk.mode_message.as_deref().map(|more| format!(" ({more})")).unwrap_or_default();
        said.push(match (disk.mode, &disk.mode_reason, spec.backup_type) {
            (DiskMode::Incremental, ..) => {
                let from = status.from_checkpoint.as_deref().unwrap_or("its base");
                format!("{} is read incrementally, from {from}.", disk.name)
            }
            (_, Some(reason), _) => format!("{} is read in full, since {reason}{more}.", disk.name),
            (_, None, BackupType::Full) => format!("{} is read in full, as was asked for.", disk.name),
            (_, None, BackupType::Incremental) => format!("{} is read in full.", disk.name),
        });
        if let Some(missing) = disk.missing_bytes.filter(|missing| *missing > 0) {
            said.push(format!("{missing} bytes of {} had to be read and were not.", disk.name));
        }
    }
    let begun = backup.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let taken = status.ready_time.as_ref().map(|time| time.0);
    match (begun, taken) {
        (Some(begun), Some(taken)) => {
            said.push(format!("From its creation to its point in time it took {} s.", seconds(begun, taken)));
        }
        (Some(begun), None) if !status.phase.is_terminal() => {
            said.push(format!("It has waited for {} s so far.", seconds(begun, now)));
        }
        _ => {}
    }
    if let Some(frozen) = status.frozen_milliseconds {
        said.push(format!("The guest's file systems were frozen for {frozen} ms."));
    }
    if let Some(taken) = taken {
        let end = status.completion_time.as_ref().map(|time| time.0);
        let words = if end.is_some() { "It was held Ready and read for" } else { "It has been Ready for" };
        said.push(format!(
            "{words} {} s; the VM can be neither migrated nor resized meanwhile.",
            seconds(taken, end.unwrap_or(now))
        ));
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(spec: serde_json::Value, status: serde_json::Value) -> String {
        let mut metadata = serde_json::json!({"name": "db01-1"});
        metadata["creationTimestamp"] = "2026-11-30T00:00:00Z".into();
        let object = serde_json::json!({"metadata": metadata, "spec": spec, "status": status});
        let object: VmBackup = serde_json::from_value(object).unwrap();
        backup(&object, "2026-11-30T00:01:00Z".parse().unwrap()).join("\n")
    }

    fn because(reason: &str, message: &str) -> serde_json::Value {
        serde_json::json!([{"type": "Ready", "status": "False", "reason": reason, "message": message,
            "lastTransitionTime": "2026-11-30T00:00:00Z"}])
    }

    #[test]
    fn why_it_waits_is_full_or_failed() {
        let waits = told(
            serde_json::json!({"vm": "db01"}),
            serde_json::json!({"phase": "Initializing", "conditions": because("VmNotRunning", "VM db01 is off")}),
        );
        assert!(waits.contains("The reason is VmNotRunning: VM db01 is off."), "{waits}");
        assert!(waits.contains("waited for 60 s"), "{waits}");
        let failed = told(
            serde_json::json!({"vm": "db01"}),
            serde_json::json!({"phase": "Failed", "conditions": because("ScratchExhausted", "10 GiB")}),
        );
        assert!(failed.contains("That means: Writes of the guest filled the scratch space."), "{failed}");
        let full = told(
            serde_json::json!({"vm": "db01", "type": "Incremental"}),
            serde_json::json!({"phase": "Succeeded", "fromCheckpoint": "cp", "readyTime": "2026-11-30T00:00:10Z",
                "completionTime": "2026-11-30T00:00:40Z", "frozenMilliseconds": 80, "disks": [
                {"name": "vda", "mode": "Incremental", "inCheckpoint": true},
                {"name": "vdb", "mode": "Full", "modeReason": "SizeChanged", "modeMessage": "1 to 2"}]}),
        );
        for words in [
            "vda is read incrementally, from cp.",
            "vdb is read in full, since its size changed (1 to 2).",
            "point in time it took 10 s",
            "frozen for 80 ms",
            "read for 30 s",
        ] {
            assert!(full.contains(words), "{full} has no {words}");
        }
    }
}
