//! One look at the bitmaps of a domain: image headers, what libvirt knows, and what QEMU says of those that VmCheckpoints
//! name. It changes no image, and of libvirt's notes it leaves those of others alone.

use std::path::PathBuf;
use std::time::SystemTime;

use super::report::{Found, Wanted};
use crate::agent::backup::act::{Host, HostError, uncounted};
use crate::agent::image::{Info, read_locked, read_shared};
use crate::api::{BitmapHealth, DomainState, SightedBitmap};
use crate::libvirt::xml::{self, Domain, NotedDisk};
use crate::libvirt::{DomainJob, LibvirtError, one_line};

/// What an image of a domain was when its header was read.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp(PathBuf, u64, Option<SystemTime>);

/// What was read of the headers of a domain's images.
#[derive(Clone, Debug, Default)]
pub struct Headers {
    images: Vec<(String, PathBuf, Option<Info>)>,
    stamps: Vec<Stamp>,
}

/// What to look at.
pub struct Question {
    /// The domain's uuid.
    pub vm_uuid: String,
    /// The VmCheckpoints to look at.
    pub wanted: Vec<Wanted>,
    /// How the names begin of the bitmaps that Virtmark makes for this cluster.
    pub prefix: String,
    /// Headers that were read before, and may do.
    pub headers: Option<Headers>,
    /// Ask for the images' locks: the answer is final.
    pub locked: bool,
}

/// What was seen.
pub struct Answer {
    /// The bitmaps.
    pub found: Found,
    /// Whether there is a QEMU.
    pub active: bool,
    /// The headers that it is told from.
    pub headers: Headers,
}

/// Looks; `None` when now is no time for it: a job runs, the domain is on its way somewhere, or `stop` says so.
///
/// # Errors
/// libvirt's; an image that cannot be read is no error, and nothing is said of it.
pub fn look(host: &Host, question: &Question, stop: &dyn Fn() -> bool) -> Result<Option<Answer>, HostError> {
    let uuid = question.vm_uuid.as_str();
    let Some(listed) = host.libvirt.lookup(uuid)? else { return Ok(None) };
    let Ok(domain) = Domain::parse(&listed.xml) else { return Ok(None) };
    let active = match listed.state {
        DomainState::Running | DomainState::Paused => true,
        DomainState::Off => false,
        _ => return Ok(None),
    };
    let busy = !domain.disks_with_block_job().is_empty() || host.libvirt.job(uuid)? != DomainJob::None;
    if busy || stop() {
        return Ok(None);
    }
    let images = domain.devices.disks.iter().filter(|disk| disk.format() == "qcow2");
    let images = images.filter_map(|disk| Some((disk.target.dev.clone(), PathBuf::from(disk.path()?))));
    let images: Vec<_> = images.collect();
    let headers = read_headers(question, &images, active);
    let mut found = Found::default();
    for (target, _, info) in &headers.images {
        for bitmap in info.iter().flat_map(Info::bitmaps) {
            let health = match (active, bitmap.is_in_use()) {
                (true, _) => BitmapHealth::Unknown,
                (false, true) => BitmapHealth::Broken,
                (false, false) => BitmapHealth::Whole,
            };
            let message = (health == BitmapHealth::Broken)
                .then(|| "qemu-img says: in-use: it was not stored when its QEMU ended".to_owned());
            let granularity = i64::try_from(bitmap.granularity).ok();
            found.put(&bitmap.name, sighted(target, health, granularity, None, message));
        }
    }
    let mut noted = host.libvirt.checkpoint_names(uuid)?;
    // known before that is asked: what a backup notes once it has its claim is not among them
    if stop() {
        return Ok(None);
    }
    forget_left(host, question, &mut noted)?;
    for name in &noted {
        let known = host.libvirt.checkpoint_disks(uuid, name, false)?.unwrap_or_default();
        for NotedDisk { target, .. } in known.into_iter().filter(|disk| is_disk(&images, &disk.target)) {
            if found.get(name, &target).is_none() {
                found.put(name, sighted(&target, BitmapHealth::Unknown, None, None, None));
            }
        }
    }
    for wanted in &question.wanted {
        if stop() {
            return Ok(None);
        }
        let is_noted = noted.contains(&wanted.name);
        let targets: Vec<_> =
            wanted.targets.iter().map(String::as_str).filter(|target| is_disk(&images, target)).collect();
        let asked = match (active, is_noted) {
            (false, _) => stored(&headers, &wanted.name, &targets),
            (true, true) => count_noted(host, uuid, &wanted.name, &targets)?,
            (true, false) => probe(host, uuid, &headers, &wanted.name, &targets)?,
        };
        asked.into_iter().for_each(|bitmap| found.put(&wanted.name, bitmap));
    }
    // what failed backups had to leave is about to go
    host.state
        .orphans()?
        .iter()
        .filter_map(|record| record.bitmap.as_ref())
        .for_each(|name| found.remove(name));
    if !active && host.libvirt.qemu(uuid)?.is_some() {
        // it was started meanwhile: what the headers said is its QEMU's now
        return Ok(None);
    }
    Ok(Some(Answer { found, active, headers }))
}

/// Has libvirt forget what an agent left that died in the middle of a look, or of a backup that is no more: a VM with a
/// checkpoint that libvirt knows can neither migrate nor be undefined. While no backup has its claim, none of ours is to be known.
fn forget_left(host: &Host, question: &Question, noted: &mut Vec<String>) -> Result<(), HostError> {
    let (left, others): (Vec<_>, Vec<_>) =
        std::mem::take(noted).into_iter().partition(|name| name.starts_with(&question.prefix));
    *noted = others;
    for name in left {
        tracing::info!(
            domain = question.vm_uuid,
            checkpoint = name,
            "a note of libvirt's that was left is dropped"
        );
        host.libvirt.checkpoint_forget(&question.vm_uuid, &name)?;
    }
    // one of another's name that was being looked at
    for wanted in question.wanted.iter().filter(|wanted| !wanted.name.starts_with(&question.prefix)) {
        if noted.contains(&wanted.name)
            && host.libvirt.checkpoint_is_probe(&question.vm_uuid, &wanted.name)?
        {
            host.libvirt.checkpoint_forget(&question.vm_uuid, &wanted.name)?;
            noted.retain(|name| *name != wanted.name);
        }
    }
    Ok(())
}

fn is_disk(images: &[(String, PathBuf)], target: &str) -> bool {
    images.iter().any(|(known, _)| known == target)
}

/// The headers of `images`; those that were read before, of images that are the same since, or that a QEMU has: it adds to a
/// header when it ends, and hardly before.
fn read_headers(question: &Question, images: &[(String, PathBuf)], active: bool) -> Headers {
    let stamps: Vec<_> = images
        .iter()
        .map(|(_, path)| {
            let meta = std::fs::metadata(path).ok();
            let modified = meta.as_ref().and_then(|meta| meta.modified().ok());
            Stamp(path.clone(), meta.map_or(0, |meta| meta.len()), modified)
        })
        .collect();
    let same = |before: &Headers| {
        let paths = before.images.iter().map(|(target, path, _)| (target, path));
        paths.eq(images.iter().map(|(target, path)| (target, path))) && (active || before.stamps == stamps)
    };
    if let Some(before) = question.headers.as_ref().filter(|before| !question.locked && same(before)) {
        return before.clone();
    }
    let read = if question.locked && !active { read_locked } else { read_shared };
    let images = images.iter().map(|(target, path)| {
        let info =
            read(path).inspect_err(|error| tracing::debug!(disk = target, %error, "a header was not read"));
        (target.clone(), path.clone(), info.ok())
    });
    Headers { images: images.collect(), stamps }
}

fn sighted(
    target: &str,
    health: BitmapHealth,
    granularity: Option<i64>,
    dirty: Option<u64>,
    message: Option<String>,
) -> SightedBitmap {
    let dirty_bytes = dirty.and_then(|bytes| i64::try_from(bytes).ok());
    let message = message.map(|words| one_line(&words, 256));
    SightedBitmap { target: target.to_owned(), health, granularity, dirty_bytes, message }
}

/// What the headers say of a domain that is off. Of an image that could not be read nothing is said.
fn stored(headers: &Headers, name: &str, targets: &[&str]) -> Vec<SightedBitmap> {
    let asked = headers.images.iter().filter(|(target, ..)| targets.contains(&target.as_str()));
    let missing = asked.filter(|(_, _, info)| info.as_ref().is_some_and(|info| info.bitmap(name).is_none()));
    let words = || Some(format!("qemu-img says: the image has no bitmap {name}"));
    missing.map(|(target, ..)| sighted(target, BitmapHealth::Missing, None, None, words())).collect()
}

/// What QEMU counts of a checkpoint that is another's, and that libvirt knows already: its note is left as it is.
fn count_noted(
    host: &Host,
    uuid: &str,
    name: &str,
    targets: &[&str],
) -> Result<Vec<SightedBitmap>, HostError> {
    let counted = host.libvirt.checkpoint_disks(uuid, name, true)?.unwrap_or_default();
    let one = |target: &&str| match counted.iter().find(|disk| disk.target == **target)?.dirty {
        Some(bytes) => Some(sighted(target, BitmapHealth::Whole, None, Some(bytes), None)),
        None => Some(sighted(target, BitmapHealth::Broken, None, None, Some(uncounted(name, target)))),
    };
    Ok(targets.iter().filter_map(one).collect())
}

/// Makes libvirt know the checkpoint for a moment, after it saw that the bitmaps are whole, and has QEMU count them.
fn probe(
    host: &Host,
    uuid: &str,
    headers: &Headers,
    name: &str,
    targets: &[&str],
) -> Result<Vec<SightedBitmap>, HostError> {
    let ask = |targets: &[&str]| -> Result<Vec<SightedBitmap>, LibvirtError> {
        let xml = xml::checkpoint_xml(name, targets, Some(xml::PROBE));
        host.libvirt.checkpoint_redefine(uuid, &xml, true)?;
        // sizes that cannot be merged, below a snapshot, say, are no word about the bitmap
        let counted = host.libvirt.checkpoint_disks(uuid, name, true);
        host.libvirt.checkpoint_forget(uuid, name)?;
        let counted = match counted {
            Err(error) if error.is_unreachable() || error.is_busy() || error.is_monitor_lost() => {
                return Err(error);
            }
            counted => counted.ok().flatten().unwrap_or_default(),
        };
        let dirty = |target: &str| counted.iter().find(|disk| disk.target == target)?.dirty;
        let whole = targets.iter().map(|target| {
            let granularity = granularity(headers, target, name);
            sighted(target, BitmapHealth::Whole, granularity, dirty(target), None)
        });
        Ok(whole.collect())
    };
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    match ask(targets) {
        Err(error) if error.is_inconsistent() => {}
        other => return Ok(other?),
    }
    let mut all = Vec::new();
    for target in targets {
        match ask(&[target]) {
            Ok(one) => all.extend(one),
            Err(error) if error.is_no_disk() => {}
            Err(error) if error.is_inconsistent() => {
                let is_stored = header(headers, target).is_some_and(|info| info.bitmap(name).is_some());
                let health = if is_stored { BitmapHealth::Broken } else { BitmapHealth::Missing };
                all.push(sighted(target, health, None, None, Some(error.to_string())));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(all)
}

fn header<'a>(headers: &'a Headers, target: &str) -> Option<&'a Info> {
    headers.images.iter().find(|(known, ..)| known == target)?.2.as_ref()
}

/// As the header says; of a bitmap that is in no header yet, what QEMU gives a new one.
fn granularity(headers: &Headers, target: &str, name: &str) -> Option<i64> {
    let info = header(headers, target)?;
    let stored = info.bitmap(name).map(|bitmap| bitmap.granularity);
    stored.or(info.new_granularity()).and_then(|bytes| i64::try_from(bytes).ok())
}
