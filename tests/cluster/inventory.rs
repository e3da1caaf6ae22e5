//! The inventory follows libvirt's events: define, start, a disk more, stop, undefine.

use anyhow::Result;
use virtmark_bed::wait_until;

use super::rig::{BOUND, MIB, Rig, small};

fn targets(rig: &Rig) -> Result<Vec<String>> {
    let disks = rig.get("lvd", &rig.vm.name)?["status"]["disks"].as_array().cloned().unwrap_or_default();
    Ok(disks.iter().filter_map(|disk| disk["target"].as_str().map(str::to_owned)).collect())
}

#[test]
fn what_libvirt_says_is_published_as_it_happens() -> Result<()> {
    // defining it is enough to be published: `off` waits for that
    let rig = Rig::off("inventory", small())?;
    let status = rig.get("lvd", "inventory")?["status"].clone();
    assert_eq!(status["disks"][0]["format"], "qcow2");
    assert_eq!(status["disks"][0]["size"], 64 * MIB);
    assert_eq!(status["disks"][0]["backup"], "Incremental");
    let image = rig.vm.image("vda").to_string_lossy().into_owned();
    assert_eq!(status["disks"][0]["backingChain"][0]["file"], image.as_str());
    rig.vm.start()?;
    rig.published("Running")?;

    let node = rig.vm.hypervisor();
    let more = rig.vm.image("vdz");
    std::fs::File::create(&more)?.set_len(MIB)?;
    let xml = rig.files.path().join("disk.xml");
    let disk = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='vdz' bus='virtio'/><serial>hot</serial></disk>",
        more.display()
    );
    std::fs::write(&xml, disk)?;
    node.virsh(&["attach-device", "inventory", &xml.to_string_lossy(), "--live"])?;
    wait_until(BOUND, "the new disk", || Ok(targets(&rig)?.contains(&"vdz".to_owned()).then_some(())))?;

    node.virsh(&["suspend", "inventory"])?;
    rig.published("Paused")?;
    node.virsh(&["resume", "inventory"])?;
    rig.published("Running")?;
    rig.vm.destroy()?;
    rig.published("Off")?;
    assert_eq!(targets(&rig)?, ["vda"], "a disk that was attached live went with its QEMU");
    node.virsh(&["undefine", "inventory"])?;
    rig.published("Missing")
}
