//! The libvirt calls that the `virt` crate does not wrap: backups, checkpoints, freeze and thaw, events.
//!
//! All `unsafe` of Virtmark is in this file. Every function blocks; none keeps a pointer after it returns,
//! but for event registrations, whose sender libvirt frees itself.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt::sys;

use super::LibvirtError;

/// Gets what a domain event said: the domain's uuid. Level-triggered: what happened is read afterwards.
pub(super) type EventSender = std::sync::mpsc::Sender<String>;

fn last<T>() -> Result<T, LibvirtError> {
    Err(Error::last_error().into())
}

fn c_string(text: &str) -> Result<CString, LibvirtError> {
    CString::new(text).map_err(|_| LibvirtError::invalid("a NUL byte in text for libvirt"))
}

fn check(code: c_int) -> Result<(), LibvirtError> {
    if code < 0 { last() } else { Ok(()) }
}

/// Takes a string that libvirt allocated, and frees it.
fn take_string(text: *mut c_char) -> Result<String, LibvirtError> {
    if text.is_null() {
        return last();
    }
    // SAFETY: libvirt returned a NUL-terminated string that is ours to free; it is copied first.
    let owned = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    // SAFETY: libvirt's strings come from malloc; nothing else holds this one.
    unsafe { libc_free(text.cast()) };
    Ok(owned)
}

unsafe extern "C" {
    #[link_name = "free"]
    fn libc_free(memory: *mut c_void);
}

/// `virDomainBackupBegin` with our own scratch images.
pub(super) fn backup_begin(
    domain: &Domain,
    backup: &str,
    checkpoint: Option<&str>,
) -> Result<(), LibvirtError> {
    let backup = c_string(backup)?;
    let checkpoint = checkpoint.map(c_string).transpose()?;
    let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |xml| xml.as_ptr());
    // SAFETY: the domain pointer lives as long as `domain`; both strings outlive the call.
    check(unsafe {
        sys::virDomainBackupBegin(
            domain.as_ptr(),
            backup.as_ptr(),
            checkpoint,
            sys::VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL,
        )
    })
}

/// `virDomainBackupGetXMLDesc`: the running backup job.
pub(super) fn backup_xml(domain: &Domain) -> Result<String, LibvirtError> {
    // SAFETY: the domain pointer lives as long as `domain`.
    take_string(unsafe { sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0) })
}

/// `virDomainAbortJob`.
pub(super) fn abort_job(domain: &Domain) -> Result<(), LibvirtError> {
    // SAFETY: the domain pointer lives as long as `domain`.
    check(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })
}

/// `virDomainAgentSetResponseTimeout`: bounds every guest agent command of the domain, in seconds.
pub(super) fn agent_timeout(domain: &Domain, seconds: i32) -> Result<(), LibvirtError> {
    // SAFETY: the domain pointer lives as long as `domain`.
    check(unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), seconds, 0) })
}

/// `virDomainFSFreeze` of every file system.
pub(super) fn freeze(domain: &Domain) -> Result<(), LibvirtError> {
    // SAFETY: the domain pointer lives as long as `domain`; no mount points are passed.
    check(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// `virDomainFSThaw` of every file system.
pub(super) fn thaw(domain: &Domain) -> Result<(), LibvirtError> {
    // SAFETY: the domain pointer lives as long as `domain`; no mount points are passed.
    check(unsafe { sys::virDomainFSThaw(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// Makes a checkpoint from `xml`, or redefines it, as `flags` say (`virDomainCheckpointCreateFlags`).
pub(super) fn checkpoint_create(domain: &Domain, xml: &str, flags: u32) -> Result<(), LibvirtError> {
    let xml = c_string(xml)?;
    // SAFETY: the domain pointer lives as long as `domain`; the string outlives the call.
    let checkpoint = unsafe { sys::virDomainCheckpointCreateXML(domain.as_ptr(), xml.as_ptr(), flags) };
    if checkpoint.is_null() {
        return last();
    }
    // SAFETY: the call above gave us one reference, which ends here.
    check(unsafe { sys::virDomainCheckpointFree(checkpoint) })
}

/// Deletes a checkpoint; with `metadata_only` its bitmaps stay in the images.
pub(super) fn checkpoint_delete(
    domain: &Domain,
    name: &str,
    metadata_only: bool,
) -> Result<(), LibvirtError> {
    let name = c_string(name)?;
    // SAFETY: the domain pointer lives as long as `domain`; the string outlives the call.
    let checkpoint = unsafe { sys::virDomainCheckpointLookupByName(domain.as_ptr(), name.as_ptr(), 0) };
    if checkpoint.is_null() {
        return last();
    }
    let flags = if metadata_only { sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY } else { 0 };
    // SAFETY: the look-up gave a valid reference.
    let deleted = check(unsafe { sys::virDomainCheckpointDelete(checkpoint, flags) });
    // SAFETY: the look-up gave us one reference, which ends here. Its result cannot matter any more.
    unsafe { sys::virDomainCheckpointFree(checkpoint) };
    deleted
}

/// The XML of a checkpoint that libvirt knows; with `sizes` QEMU counts what each of its bitmaps calls dirty.
pub(super) fn checkpoint_xml(domain: &Domain, name: &str, sizes: bool) -> Result<String, LibvirtError> {
    let name = c_string(name)?;
    // SAFETY: the domain pointer lives as long as `domain`; the string outlives the call.
    let checkpoint = unsafe { sys::virDomainCheckpointLookupByName(domain.as_ptr(), name.as_ptr(), 0) };
    if checkpoint.is_null() {
        return last();
    }
    let sizes = if sizes { sys::VIR_DOMAIN_CHECKPOINT_XML_SIZE } else { 0 };
    let flags = sys::VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN | sizes;
    // SAFETY: the look-up gave a valid reference.
    let xml = take_string(unsafe { sys::virDomainCheckpointGetXMLDesc(checkpoint, flags) });
    // SAFETY: the look-up gave us one reference, which ends here. Its result cannot matter any more.
    unsafe { sys::virDomainCheckpointFree(checkpoint) };
    xml
}

/// The names of the checkpoints that libvirt knows.
pub(super) fn checkpoint_names(domain: &Domain) -> Result<Vec<String>, LibvirtError> {
    let mut list: *mut sys::virDomainCheckpointPtr = ptr::null_mut();
    // SAFETY: the domain pointer lives as long as `domain`; libvirt puts an array of its own at `list`.
    let count = unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), &raw mut list, 0) };
    check(count)?;
    let mut names = Vec::new();
    for at in 0..usize::try_from(count).unwrap_or_default() {
        // SAFETY: the array has `count` valid references.
        let checkpoint = unsafe { *list.add(at) };
        // SAFETY: the reference is valid; its name lives as long as it does, and is copied first.
        let name = unsafe { CStr::from_ptr(sys::virDomainCheckpointGetName(checkpoint)) };
        names.push(name.to_string_lossy().into_owned());
        // SAFETY: each reference of the array is ours to give up, once.
        unsafe { sys::virDomainCheckpointFree(checkpoint) };
    }
    // SAFETY: the array came from malloc, and nothing else holds it.
    unsafe { libc_free(list.cast()) };
    Ok(names)
}

extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _event: c_int,
    _detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    report(domain, opaque);
    0
}

extern "C" fn on_device(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _alias: *const c_char,
    opaque: *mut c_void,
) {
    report(domain, opaque);
}

extern "C" fn on_job(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _params: sys::virTypedParameterPtr,
    _count: c_int,
    opaque: *mut c_void,
) {
    report(domain, opaque);
}

fn report(domain: sys::virDomainPtr, opaque: *mut c_void) {
    let mut uuid: [c_char; 37] = [0; 37];
    // SAFETY: libvirt passes a live domain; the buffer has VIR_UUID_STRING_BUFLEN (37) bytes.
    if unsafe { sys::virDomainGetUUIDString(domain, uuid.as_mut_ptr()) } < 0 {
        return;
    }
    // SAFETY: libvirt wrote a NUL-terminated string into the buffer.
    let uuid = unsafe { CStr::from_ptr(uuid.as_ptr()) }.to_string_lossy().into_owned();
    // SAFETY: `opaque` is the boxed sender of `register`; libvirt frees it only after the last event.
    let sender = unsafe { &*opaque.cast::<EventSender>() };
    // a receiver that is gone means that the agent is shutting down
    let _ = sender.send(uuid);
}

extern "C" fn free_sender(opaque: *mut c_void) {
    // SAFETY: `opaque` came from Box::into_raw in `register`, and libvirt calls this exactly once.
    drop(unsafe { Box::from_raw(opaque.cast::<EventSender>()) });
}

/// Registers for life-cycle, device and job events of every domain of `connection`.
pub(super) fn register(connection: &Connect, sender: &EventSender) -> Result<(), LibvirtError> {
    type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
    // SAFETY: this and the next two: libvirt's API takes every callback as the generic type and calls it with the
    // arguments of its event id, which are those of the functions above (libvirt-domain.h,
    // VIR_DOMAIN_EVENT_CALLBACK).
    let lifecycle: Generic = unsafe { std::mem::transmute(on_lifecycle as *const ()) };
    // SAFETY: as above.
    let device: Generic = unsafe { std::mem::transmute(on_device as *const ()) };
    // SAFETY: as above.
    let job: Generic = unsafe { std::mem::transmute(on_job as *const ()) };
    for (event, callback) in [
        (sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED, device),
        (sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, device),
        (sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, job),
    ] {
        let event = c_int::try_from(event).map_err(|_| LibvirtError::invalid("event id out of range"))?;
        let opaque = Box::into_raw(Box::new(sender.clone())).cast();
        // SAFETY: the connection is alive; a null domain asks for all; `opaque` is freed by `free_sender`.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                ptr::null_mut(),
                event,
                Some(callback),
                opaque,
                Some(free_sender),
            )
        };
        if id < 0 {
            free_sender(opaque);
            return last();
        }
    }
    Ok(())
}
