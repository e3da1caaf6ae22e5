//! Deleted at every phase, in every way that kubectl has, and by hand: the host is clean, nothing is left, and the name
//! is used again at once.

use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use virtmark::killpoint::PAUSE_VARIABLE;
use virtmark::step::Step;
use virtmark_bed::{Disk, wait_until};

use super::history::History;
use super::rig::{BOUND, MIB, Rig};

/// Where a VmBackup is when it is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Nobody has looked at it.
    Unseen,
    /// It waits for another backup of its VM.
    Waiting,
    /// Its agent stands still after this step.
    Step(Step),
    Ready,
    /// A client reads.
    MidRead,
    Succeeded,
    Failed,
}

/// How it is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Background,
    Foreground,
    Orphan,
    /// `--force --grace-period=0`, which means nothing to a custom resource.
    Force,
    /// Its finalizers removed by hand: nobody is asked.
    ByHand,
}

const CASES: [(At, Way); 14] = [
    (At::Unseen, Way::Background),
    (At::Waiting, Way::ByHand),
    (At::Step(Step::RecordStored), Way::Background),
    (At::Step(Step::Frozen), Way::ByHand),
    (At::Step(Step::BeginIntended), Way::Orphan),
    (At::Step(Step::BeginAnswered), Way::Foreground),
    (At::Step(Step::BeginAnswered), Way::ByHand),
    (At::Ready, Way::Foreground),
    (At::Ready, Way::ByHand),
    (At::MidRead, Way::Orphan),
    (At::Step(Step::FinalizeSeen), Way::Force),
    (At::Step(Step::JobAborted), Way::Background),
    (At::Succeeded, Way::Foreground),
    (At::Failed, Way::ByHand),
];

const NAME: &str = "deleted";

#[test]
fn a_backup_deleted_at_any_phase_in_any_way_leaves_nothing() -> Result<()> {
    let _alone = super::alone();
    let mut rig = Rig::running_on(1, NAME, [Disk::qcow2("vda", 64 * MIB)])?;
    rig.vm.write("vda", 0, 48 * MIB, 0x11)?;
    let history = History::watch(&rig.bed)?;
    for (at, way) in CASES {
        let began = Instant::now();
        delete(&mut rig, &history, at, way).with_context(|| format!("deleted {way:?} at {at:?}"))?;
        println!("{at:?} {way:?}: {} ms", began.elapsed().as_millis());
        history.check()?;
    }
    // after all that its name still makes a backup
    create_again(&rig)?;
    read_all(&rig)?;
    rig.phase("vmbackup", NAME, "Succeeded")?;
    println!("{} deletions, {} versions, none went back", CASES.len(), history.check()?);
    Ok(())
}

fn delete(rig: &mut Rig, history: &History, at: At, way: Way) -> Result<()> {
    let mut reader = None;
    match at {
        At::Unseen => rig.bed.operator.pause(),
        At::Waiting => {
            rig.backup("deleted-first", json!({}))?;
            rig.phase("vmbackup", "deleted-first", "Ready")?;
        }
        At::Step(step) => {
            rig.bed.agents[1].restart(&[(PAUSE_VARIABLE, step.as_str())])?;
            rig.bed.store()?;
        }
        _ => {}
    }
    create_again(rig)?;
    match at {
        At::Unseen => {}
        At::Waiting => drop(rig.reason("vmbackup", NAME, "BackupAlreadyRunning")?),
        At::Step(step) => {
            if matches!(step, Step::FinalizeSeen | Step::JobAborted) {
                read_all(rig)?;
            }
            let agent = &rig.bed.agents[1].process;
            wait_until(BOUND, "the agent to stand still", || Ok(agent.is_paused().then_some(())))?;
        }
        At::Ready => drop(rig.ticket("deleted-vda")?),
        At::MidRead => reader = Some(start_reading(rig)?),
        At::Succeeded => {
            read_all(rig)?;
            rig.phase("vmbackup", NAME, "Succeeded")?;
        }
        At::Failed => {
            rig.phase("vmbackup", NAME, "Ready")?;
            rig.state("vmbackup", NAME, "Cancelled")?;
            rig.phase("vmbackup", NAME, "Failed")?;
        }
    }
    let object = rig.get("vmbackup", NAME)?;
    let uid = object["metadata"]["uid"].as_str().context("no uid")?.to_owned();
    remove(rig, way)?;
    rig.bed.operator.resume();
    rig.bed.agents[1].resume();
    if matches!(way, Way::Foreground | Way::Orphan) {
        collect(rig, &uid)?;
    }
    wait_until(BOUND, "the VmBackup to go", || {
        Ok((rig.get("vmbackup", NAME)?["metadata"]["uid"] != uid.as_str()).then_some(()))
    })?;
    if let Some(mut reader) = reader {
        ensure!(!reader.wait()?.success(), "the reader was not cut off");
    }
    if at == At::Waiting {
        rig.delete("vmbackup", "deleted-first")?;
    }
    // once a finalize is obeyed, and said to be, the checkpoint is what the backup was for
    history.check()?;
    let last =
        history.versions("VmBackup", NAME).into_iter().rfind(|seen| seen["metadata"]["uid"] == uid.as_str());
    let succeeded = last.is_some_and(|last| last["status"]["phase"] == "Succeeded");
    ensure!(succeeded || at != At::Succeeded, "a backup that had succeeded did not");
    let kept = usize::from(succeeded);
    nothing_is_left(rig, &uid, kept)
}

/// Makes the backup; the object that had its name may still be on its way out.
fn create_again(rig: &Rig) -> Result<()> {
    wait_until(BOUND, "the name to be free", || {
        match rig.backup(NAME, json!({"quiesce": {"mode": "None"}})) {
            Err(error) if !error.to_string().contains("AlreadyExists") => Err(error),
            made => Ok(made.ok()),
        }
    })
}

fn read_all(rig: &Rig) -> Result<()> {
    let then = rig.vm.remember("vda")?;
    wait_until(BOUND, "the disk to be read", || Ok(rig.read("deleted-vda", &then).ok()))?;
    rig.state("vmbackup", NAME, "Finalized")
}

/// curl of the disk, at 8 MiB a second, once bytes come.
fn start_reading(rig: &Rig) -> Result<Child> {
    let ticket = rig.ticket("deleted-vda")?;
    let image = rig.files.path().join("cut.raw");
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--limit-rate", "8M", "--max-time", "60", "--cacert"]).arg(&ticket.ca);
    let child = curl.arg("-o").arg(&image).arg(&ticket.url).stderr(Stdio::null()).spawn()?;
    wait_until(BOUND, "bytes to come", || {
        Ok(std::fs::metadata(&image).ok().filter(|file| file.len() > 0).map(drop))
    })?;
    Ok(child)
}

fn remove(rig: &Rig, way: Way) -> Result<()> {
    let arguments: &[&str] = match way {
        Way::Background => &["--cascade=background"],
        Way::Foreground => &["--cascade=foreground"],
        Way::Orphan => &["--cascade=orphan"],
        Way::Force | Way::ByHand => &["--force", "--grace-period=0"],
    };
    rig.kubectl(&[&["delete", "vmbackup", NAME, "--wait=false"], arguments].concat())?;
    if way == Way::ByHand {
        unhold(rig, "vmbackup", NAME)?;
    }
    Ok(())
}

/// Removes an object's finalizers by hand; it may be gone already.
fn unhold(rig: &Rig, kind: &str, name: &str) -> Result<()> {
    let patched =
        rig.kubectl(&["patch", kind, name, "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#]);
    match patched {
        Err(error) if !error.to_string().contains("NotFound") => Err(error),
        _ => Ok(()),
    }
}

/// Kubernetes' garbage collector, which the bed has not: its finalizer goes last, once ours is gone.
fn collect(rig: &Rig, uid: &str) -> Result<()> {
    wait_until(BOUND, "the operator's finalizer to go", || {
        let object = rig.get("vmbackup", NAME)?;
        let finalizers = object["metadata"]["finalizers"].as_array().cloned().unwrap_or_default();
        let ours = finalizers.iter().any(|finalizer| finalizer == virtmark::api::FINALIZER);
        Ok((object["metadata"]["uid"] != uid || !ours).then_some(()))
    })?;
    unhold(rig, "vmbackup", NAME)
}

/// Nothing of the backup `uid` is on the host or in the API, but for a checkpoint that it was for.
fn nothing_is_left(rig: &Rig, uid: &str, kept: usize) -> Result<()> {
    let of_uid = format!("virtmark.dev/backup-uid={uid}");
    let node = rig.vm.hypervisor();
    let mut last = String::new();
    wait_until(BOUND, "everything of it to go", || {
        let count = |kind: &str| rig.list(kind, &of_uid).map(|found| found.len());
        let (transfers, secrets, checkpoints) =
            (count("imagetransfers")?, count("secrets")?, count("vmcheckpoints")?);
        let bitmaps = rig.bitmaps("vda")?.len();
        let job = node.virsh(&["domjobinfo", NAME])?.contains("None");
        let noted = node.virsh(&["checkpoint-list", "--name", NAME])?;
        let folders = ["run", "state/backups"].map(|folder| node.dir.join("agent").join(folder).join(uid).exists());
        last = format!(
            "{transfers} transfers, {secrets} Secrets, {checkpoints} checkpoints, {bitmaps} bitmaps, idle {job}, \
             noted {noted:?}, folders {folders:?}"
        );
        let clean = job && noted.trim().is_empty() && folders == [false, false];
        Ok((transfers == 0 && secrets == 0 && checkpoints == kept && bitmaps == kept && clean).then_some(()))
    })
    .with_context(|| last.clone())?;
    for checkpoint in rig.list("vmcheckpoints", &of_uid)? {
        let name = checkpoint["metadata"]["name"].as_str().unwrap_or_default();
        rig.delete("vmcheckpoint", name)?;
        ensure!(rig.bitmaps("vda")?.is_empty(), "a deleted checkpoint's bitmap is left");
    }
    Ok(())
}

#[test]
fn transfers_and_checkpoints_deleted_at_any_phase_leave_nothing() -> Result<()> {
    let _alone = super::alone();
    let rig = Rig::off_on(1, "parts", [Disk::qcow2("vda", 16 * MIB)])?;
    let history = History::watch(&rig.bed)?;
    // nobody's, and then a backup's that is not Ready
    rig.transfer("parts-t", &json!({"backup": "parts-1", "disk": "vda"}))?;
    rig.reason("imagetransfer", "parts-t", "BackupNotFound")?;
    rig.kubectl(&["delete", "imagetransfer", "parts-t", "--timeout=30s"])?;
    rig.backup("parts-1", json!({"transfers": "Manual"}))?;
    rig.reason("vmbackup", "parts-1", "VmNotRunning")?;
    rig.transfer("parts-t", &json!({"backup": "parts-1", "disk": "vda"}))?;
    rig.reason("imagetransfer", "parts-t", "BackupNotReady")?;
    rig.kubectl(&["delete", "imagetransfer", "parts-t", "--cascade=orphan", "--wait=false"])?;
    unhold(&rig, "imagetransfer", "parts-t")?;
    rig.vm.start()?;
    rig.phase("vmbackup", "parts-1", "Ready")?;
    rig.vm.write("vda", 0, 4 * MIB, 0x22)?;

    // open: with the operator's leave, and by hand
    for way in ["", "by hand"] {
        rig.transfer("parts-t", &json!({"backup": "parts-1", "disk": "vda"}))?;
        let ticket = rig.ticket("parts-t")?;
        ensure!(ticket.curl(&["-H", "Range: bytes=0-0"])? == "206");
        rig.kubectl(&["delete", "imagetransfer", "parts-t", "--wait=false"])?;
        if !way.is_empty() {
            unhold(&rig, "imagetransfer", "parts-t")?;
            // the garbage collector's part, for the Secret's owner is gone
            rig.kubectl(&["delete", "secret", &ticket.secret, "--ignore-not-found"])?;
        }
        rig.gone("imagetransfer", "parts-t")?;
        wait_until(BOUND, &format!("the ticket of a transfer deleted {way} to end"), || {
            Ok((ticket.curl(&["-H", "Range: bytes=0-0"])? == "403").then_some(()))
        })?;
        rig.gone("secret", &ticket.secret)?;
    }
    // a client on the node that nobody sees keeps a backup alive only as long as its transfer is there
    rig.transfer("parts-n", &json!({"backup": "parts-1", "disk": "vda", "protocol": "Nbd"}))?;
    rig.phase("imagetransfer", "parts-n", "Ready")?;
    rig.kubectl(&["delete", "imagetransfer", "parts-n", "--wait=false"])?;
    unhold(&rig, "imagetransfer", "parts-n")?;
    let patch = r#"{"spec":{"clientIdleSeconds":1}}"#;
    rig.kubectl(&["patch", "vmbackup", "parts-1", "--type=merge", "-p", patch])?;
    rig.reason("vmbackup", "parts-1", "ClientIdle")?;

    // a checkpoint of a backup that runs goes when that has ended, well or not; a usable one at once, running or off
    for (name, wish) in [("parts-2", "Finalized"), ("parts-3", "Cancelled")] {
        rig.backup(name, json!({"disks": ["vda"]}))?;
        let status = rig.phase("vmbackup", name, "Ready")?;
        let checkpoint = status["toCheckpoint"].as_str().context("no checkpoint")?.to_owned();
        rig.kubectl(&["delete", "vmcheckpoint", &checkpoint, "--wait=false"])?;
        wait_until(BOUND, "the checkpoint to say that it waits", || {
            let conditions = rig.get("vmcheckpoint", &checkpoint)?["status"]["conditions"].clone();
            let busy = |condition: &Value| condition["reason"] == "CheckpointBusy";
            Ok(conditions.as_array().is_some_and(|all| all.iter().any(busy)).then_some(()))
        })?;
        ensure!(rig.bitmaps("vda")?.len() == 1, "the bitmap went while its backup ran");
        if wish == "Finalized" {
            rig.read(&format!("{name}-vda"), &rig.vm.remember("vda")?)?;
        }
        rig.state("vmbackup", name, wish)?;
        rig.gone("vmcheckpoint", &checkpoint)?;
        ensure!(rig.bitmaps("vda")?.is_empty(), "a deleted checkpoint's bitmap is left");
    }
    for off in [false, true] {
        let name = format!("parts-off-{off}");
        rig.backup(&name, json!({}))?;
        let status = rig.phase("vmbackup", &name, "Ready")?;
        rig.read(&format!("{name}-vda"), &rig.vm.remember("vda")?)?;
        rig.state("vmbackup", &name, "Finalized")?;
        rig.phase("vmbackup", &name, "Succeeded")?;
        let checkpoint = status["toCheckpoint"].as_str().context("no checkpoint")?.to_owned();
        if off {
            rig.vm.destroy()?;
            rig.published("Off")?;
        }
        rig.delete("vmcheckpoint", &checkpoint)?;
        ensure!(rig.bitmaps("vda")?.is_empty(), "off {off}: the bitmap is left");
    }
    println!("{} versions, none went back", history.check()?);
    Ok(())
}
