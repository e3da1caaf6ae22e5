//! Incremental backups over what happens to a host between two of them.

use anyhow::{Result, ensure};
use serde_json::json;
use virtmark_bed::Disk;

use super::chain::Chain;
use super::rig::{MIB, Rig};

#[test]
fn a_chain_goes_on_over_restarts_of_libvirt_and_of_the_vm() -> Result<()> {
    let _alone = super::alone();
    let rig = Rig::running_on(1, "restarted", ["vda", "vdb"].map(|target| Disk::qcow2(target, 16 * MIB)))?;
    let chain = Chain::of(&rig, "restarted");
    rig.vm.write("vda", 0, 8 * MIB, 0x11)?;
    chain.take("restarted-0", json!({}), || Ok(()))?;
    let node = rig.vm.hypervisor();
    let restart = |politely: bool| node.libvirtd_after(&node.end_libvirtd(politely)?);
    let cycle = || -> Result<()> {
        rig.vm.destroy()?;
        rig.vm.start()
    };
    let happens: [(u8, &dyn Fn() -> Result<()>); 4] = [
        (1, &|| restart(true)),
        (2, &|| restart(false)),
        (3, &cycle),
        (4, &|| {
            cycle()?;
            restart(false)
        }),
    ];
    for (number, between) in happens {
        rig.vm.write("vda", u64::from(number) * MIB, MIB / 2, 0x20 + number)?;
        between()?;
        rig.published("Running")?;
        rig.vm.write("vdb", u64::from(number) * MIB, MIB / 2, 0x20 + number)?;
        let spec = json!({"type": "Incremental", "onInvalidCheckpoint": "Fail"});
        let point =
            chain.take(&format!("restarted-{number}"), spec, || rig.vm.write("vda", 0, 4096, number))?;
        assert_eq!((point.mode("vda").as_str(), point.mode("vdb").as_str()), ("Incremental", "Incremental"));
        // what the guest wrote during the one before is 64 KiB more
        let expected = MIB / 2 + if number == 1 { 0 } else { 65536 };
        // and the last cluster that did not change may be read with it
        let is_about = |disk: &str, least: u64| (least..=least + 65536).contains(&point.restored[disk].read);
        ensure!(is_about("vda", expected) && is_about("vdb", MIB / 2), "{expected}: {:?}", point.restored);
    }
    Ok(())
}
