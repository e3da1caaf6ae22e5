//! Against XML that libvirt 11.3 printed of real domains (`tests/golden`).

use super::*;

const LIVE: &str = include_str!("../../../tests/golden/domain-live.xml");
const OFF: &str = include_str!("../../../tests/golden/domain-off.xml");

fn support(domain: &Domain) -> Vec<(&str, BackupSupport, bool)> {
    let disks = domain.devices.disks.iter();
    disks.map(|disk| (disk.target.dev.as_str(), disk.support().0, disk.support().1.is_some())).collect()
}

#[test]
fn reads_what_libvirt_prints_of_a_running_domain() {
    let domain = Domain::parse(LIVE).unwrap();
    assert_eq!(domain.name, "tricky & \"named\"");
    assert_eq!(domain.uuid, "11111111-2222-4333-8444-666666666666");
    assert_eq!(domain.qemu_owner(), Some((64055, 64055)));
    assert!(!domain.guest_agent_connected(), "its channel is disconnected");
    assert!(domain.disks_with_block_job().is_empty());
    let expected = [
        ("vda", BackupSupport::Incremental, false),
        ("vdb", BackupSupport::Full, true),
        ("vdc", BackupSupport::Unsupported, true),
        ("vdd", BackupSupport::Unsupported, true),
        ("sda", BackupSupport::Unsupported, true),
    ];
    assert_eq!(support(&domain), expected, "each refusal has a reason");
    let vda = domain.devices.disks[0].sighted(Some(8 << 20));
    assert_eq!(vda.serial.as_deref(), Some("abc"));
    let chain: Vec<_> =
        vda.backing_chain.iter().map(|layer| (layer.file.as_str(), layer.format.as_str())).collect();
    assert_eq!(chain, [("/vm/top.qcow2", "qcow2"), ("/vm/base.qcow2", "qcow2")]);
}

#[test]
fn reads_what_libvirt_prints_of_a_domain_that_is_off() {
    let domain = Domain::parse(OFF).unwrap();
    assert_eq!(domain.qemu_owner(), None, "no QEMU, no owner");
    assert_eq!(domain.devices.disks[0].path(), Some("/vm/top.qcow2"));
    assert_eq!(domain.devices.disks.len(), 5);
}

#[test]
fn a_connected_agent_and_a_block_job_are_seen() {
    let connected = LIVE.replace("state='disconnected'", "state='connected'");
    assert!(Domain::parse(&connected).unwrap().guest_agent_connected());
    let mirrored = LIVE.replacen(
        "<serial>abc</serial>",
        "<mirror type='file' job='copy'><source file='/x'/></mirror>",
        1,
    );
    assert_eq!(Domain::parse(&mirrored).unwrap().disks_with_block_job(), ["vda"]);
}

#[test]
fn what_is_no_domain_is_refused() {
    for text in ["", "<domain", "<network/>", "<domain><name>x</name></domain>", "\0", "<domain/>"] {
        assert!(Domain::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn names_are_escaped() {
    let disk = BackupDisk { target: "vda", scratch: "/run/a'b<c>&/vda.scratch", base: None };
    let expected = "<domainbackup mode='pull'><server transport='unix' socket='/run/s&apos;k'/><disks>\
        <disk name='vda' backup='yes' type='file' backupmode='full' exportname='vda'><driver type='qcow2'/>\
        <scratch file='/run/a&apos;b&lt;c&gt;&amp;/vda.scratch'><seclabel model='dac' relabel='no'/></scratch></disk>\
        </disks></domainbackup>";
    assert_eq!(backup_xml("/run/s'k", &[disk]), expected);
    assert_eq!(backup_socket(expected).as_deref(), Some("/run/s'k"));
}

#[test]
fn a_name_cannot_leave_its_place_nor_change_in_it() {
    for name in ["/run/a b\tc\r\nd", "' x='y", "]]>--><!-- &lt; &#10;", "\u{85}\u{2028}\u{1F4BE}"] {
        let disk = BackupDisk { target: name, scratch: name, base: None };
        assert_eq!(backup_socket(&backup_xml(name, &[disk])).as_deref(), Some(name));
    }
    assert!(checkpoint_xml("a\nb", &["v\tda"], None).contains("<name>a&#10;b</name>"));
}

#[test]
fn a_chain_as_long_as_libvirts_longest_is_read_and_a_longer_one_refused() {
    let nested = |layers: usize| {
        let open = "<backingStore><format type='qcow2'/><source file='/base'/>".repeat(layers);
        let chain = format!("{open}<backingStore/>{}", "</backingStore>".repeat(layers));
        let start = LIVE.find("<backingStore").unwrap();
        let end = LIVE.find("</backingStore>").unwrap() + "</backingStore>".len();
        Domain::parse(&[&LIVE[..start], &chain, &LIVE[end..]].concat())
    };
    assert_eq!(nested(200).unwrap().devices.disks[0].sighted(None).backing_chain.len(), 201);
    assert!(nested(100_000).is_err(), "and the stack is left alone");
}

#[test]
fn incremental_and_full_disks_go_in_one_backup() {
    let from = BackupDisk { target: "vda", scratch: "/s/a", base: Some("virtmark-1") };
    let all = BackupDisk { target: "vdb", scratch: "/s/b", base: None };
    let scratch = |path: &str| {
        format!(
            "<driver type='qcow2'/><scratch file='{path}'><seclabel model='dac' relabel='no'/></scratch></disk>"
        )
    };
    let expected = format!(
        "<domainbackup mode='pull'><incremental>virtmark-1</incremental><server transport='unix' socket='/k'/><disks>\
         <disk name='vda' backup='yes' type='file' backupmode='incremental' incremental='virtmark-1' \
         exportbitmap='backup-vda' exportname='vda'>{}\
         <disk name='vdb' backup='yes' type='file' backupmode='full' exportname='vdb'>{}</disks></domainbackup>",
        scratch("/s/a"),
        scratch("/s/b")
    );
    assert_eq!(backup_xml("/k", &[from, all]), expected);
}

#[test]
fn a_checkpoint_names_its_bitmap_in_each_disk() {
    let expected = "<domaincheckpoint><name>virtmark-1</name><disks>\
        <disk name='vda' checkpoint='bitmap' bitmap='virtmark-1'/>\
        <disk name='vdc' checkpoint='bitmap' bitmap='virtmark-1'/></disks></domaincheckpoint>";
    assert_eq!(checkpoint_xml("virtmark-1", &["vda", "vdc"], None), expected);
    let redefined = checkpoint_xml("virtmark-1", &["vda"], Some(7));
    assert!(redefined.contains("</name><creationTime>7</creationTime><disks>"), "{redefined}");
}

#[test]
fn the_disks_of_a_checkpoint_are_read_with_their_dirty_bytes() {
    // as libvirt 11.3 prints it, asked for sizes
    let xml = "<domaincheckpoint>\n  <name>orig</name>\n  <creationTime>1</creationTime>\n  <disks>\n    \
        <disk name='vda' checkpoint='bitmap' bitmap='orig' size='1048576'/>\n    \
        <disk name='vdb' checkpoint='bitmap' bitmap='orig'/>\n    <disk name='vdc' checkpoint='no'/>\n  </disks>\n\
        </domaincheckpoint>";
    let disk = |target: &str, dirty| NotedDisk { target: target.to_owned(), dirty };
    assert_eq!(noted_disks(xml), [disk("vda", Some(1_048_576)), disk("vdb", None)]);
    assert_eq!(noted_disks("<domaincheckpoint/>"), []);
    assert!(is_probe(xml) && is_probe(&checkpoint_xml("a", &["vda"], Some(PROBE))));
    assert!(!is_probe(&xml.replace(">1<", ">1764500000<")) && !is_probe("<domaincheckpoint/>"));
    assert_eq!(noted_disks("no xml"), []);
}
