//! What is done once a backup's job runs, and before anybody reads: the guest is not frozen any more. The images are marked,
//! and for each incremental disk it is seen how far its dirty bitmap can be believed (`imageio::tail`). It decides nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use super::life::{Action, Outcome};
use crate::agent::state::Record;
use crate::agent::{AgentError, Context};
use crate::imageio;
use crate::libvirt::xml::Domain;

/// The largest cluster that a qcow2 image can have.
const LARGEST_CLUSTER: u64 = 2 << 20;

/// Does what was not done yet. Where libvirt will not have it, that is the backup's end.
///
/// # Errors
/// When libvirt or an export cannot be asked, or the record not be kept: the caller tries again.
pub(super) async fn follow(record: &mut Record, context: &Context) -> Result<(), AgentError> {
    if !record.marked {
        let (host, asked) = (context.host.clone(), record.clone());
        let refused = context.blocking(move || match host.mark(&asked) {
            Err(error) if !host.is_cut_off(&asked, &error) => Ok(Some(error.because(Action::Begin))),
            other => other.map(|()| None),
        });
        if let Some(because) = refused.await? {
            // without its marks the checkpoint would be no base
            record.life.end(Outcome::Failed(because));
            return Ok(());
        }
        record.marked = true;
        context.host.state.store(record).map_err(AgentError::State)?;
    }
    look(record, context).await
}

/// Finds from where on all must be read as changed, for each incremental disk that it is not known of.
async fn look(record: &mut Record, context: &Context) -> Result<(), AgentError> {
    if !record.disks.iter().any(|disk| disk.incremental && disk.changed_from.is_none()) {
        return Ok(());
    }
    // while the job runs the images stay what they are
    let (host, uuid) = (context.host.clone(), record.vm_uuid.clone());
    let clusters = context.blocking(move || {
        let listed = host.libvirt.lookup(&uuid)?;
        let domain = listed.and_then(|listed| Domain::parse(&listed.xml).ok());
        let disks = domain.map(|domain| domain.devices.disks).unwrap_or_default();
        let cluster =
            |disk: &crate::libvirt::xml::Disk| disk.path().and_then(|path| cluster_of(path.as_ref()));
        let clusters = disks.iter().filter_map(|disk| Some((disk.target.dev.clone(), cluster(disk)?)));
        Ok(clusters.collect::<BTreeMap<_, _>>())
    });
    let clusters = clusters.await?;
    let mut found = record.clone();
    for disk in found.disks.iter_mut().filter(|disk| disk.incremental && disk.changed_from.is_none()) {
        let cluster = clusters.get(&disk.target).copied().unwrap_or(LARGEST_CLUSTER);
        let export = context.export(record, &disk.target)?;
        let from = imageio::unsure_from(&export, cluster).await;
        let from = from.map_err(|source| AgentError::Export { disk: disk.target.clone(), source })?;
        tracing::info!(backup = %record.uid, vm = %record.vm, disk = disk.target, from, "read as changed from here on");
        disk.changed_from = Some(from);
    }
    context.host.state.store(&found).map_err(AgentError::State)?;
    *record = found;
    Ok(())
}

/// The cluster size of a qcow2 image, from its header.
fn cluster_of(image: &Path) -> Option<u64> {
    // anything else may never answer
    let kind = image.metadata().ok()?.file_type();
    if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
        return None;
    }
    let mut header = [0; 24];
    File::open(image).ok()?.read_exact(&mut header).ok()?;
    cluster_size(header)
}

/// QEMU's docs/interop/qcow2.txt: the magic, and the number of bits of an offset within a cluster.
fn cluster_size(header: [u8; 24]) -> Option<u64> {
    let [.., a, b, c, d] = header;
    let bits = u32::from_be_bytes([a, b, c, d]);
    (header.starts_with(b"QFI\xfb") && (9..=21).contains(&bits)).then(|| 1 << bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_size_is_read_from_the_header_of_a_qcow2_image_and_no_other() {
        let header = |magic: &[u8; 4], bits: u8| {
            let mut header = [0; 24];
            header[..4].copy_from_slice(magic);
            header[23] = bits;
            cluster_size(header)
        };
        assert_eq!((header(b"QFI\xfb", 16), header(b"QFI\xfb", 21)), (Some(65536), Some(LARGEST_CLUSTER)));
        assert_eq!((header(b"QFI\xfb", 8), header(b"QFI\xfb", 22), header(b"VMDK", 16)), (None, None, None));
    }
}
