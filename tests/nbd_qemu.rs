//! The NBD client against a real qemu-nbd, its extents against those that libnbd's nbdinfo sees.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]
mod nbd_qemu_rig;

use std::time::Duration;

use nbd_qemu_rig::{QemuNbd, path, qcow2_with_bitmap, raw, run, write};
use virtmark::extent::{self, Extent, Flags, Run};
use virtmark::imageio::unsure_from;
use virtmark::nbd::handshake::HandshakeError;
use virtmark::nbd::{Client, Export, NbdError};

/// The runs that nbdinfo reports for a context.
fn nbdinfo(server: &QemuNbd, context: &str, flags: fn(u64) -> Flags) -> Vec<Run> {
    let json = run("nbdinfo", &[&format!("--map={context}"), "--json", &server.uri()]);
    let list: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let run = |entry: &serde_json::Value| Run {
        length: entry["length"].as_u64().unwrap(),
        flags: flags(entry["type"].as_u64().unwrap()),
    };
    list.iter().map(run).collect()
}

fn if_set(on: bool, flag: Flags) -> Flags {
    if on { flag } else { Flags::DATA }
}

async fn extents(client: Client) -> (Vec<Extent>, Client) {
    let mut stream = client.block_status(0).unwrap();
    let mut all = Vec::new();
    while let Some(extent) = stream.next().await {
        all.push(extent.unwrap());
    }
    (all, stream.into_client().unwrap())
}

async fn read(client: Client, offset: u64, length: u64) -> (Vec<u8>, Client) {
    let mut stream = client.read_stream(offset, length).unwrap();
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        all.extend_from_slice(&chunk.unwrap());
    }
    (all, stream.into_client().unwrap())
}

#[tokio::test]
async fn extents_of_qcow2_are_those_nbdinfo_sees() {
    let directory = tempfile::tempdir().unwrap();
    let (_, server) = qcow2_with_bitmap(directory.path());
    let client = Client::connect(&server.export(Some("b0"))).await.unwrap();
    let size = client.size();
    assert_eq!(size, (64 << 20) + 512);

    let zero = nbdinfo(&server, "base:allocation", |state| if_set(state & 2 != 0, Flags::ZERO));
    let hole = nbdinfo(&server, "qemu:allocation-depth", |depth| if_set(depth == 0, Flags::HOLE));
    let dirty = nbdinfo(&server, "qemu:dirty-bitmap:b0", |state| if_set(state & 1 != 0, Flags::DIRTY));
    let all = extent::zip(extent::zip(zero, hole), dirty);
    let expected: Vec<Extent> = extent::coalesce(extent::place(0, size, all)).collect();

    let (seen, client) = extents(client).await;
    assert_eq!(seen, expected);
    let dirty_zero = seen.iter().any(|extent| extent.dirty() && extent.zero());
    assert!(dirty_zero && seen.iter().any(Extent::hole), "{seen:?}");

    // From the middle of an extent the rest of it is told.
    let mut stream = client.block_status((1 << 20) + 100).unwrap();
    let first = stream.next().await.unwrap().unwrap();
    let whole = expected.iter().find(|extent| extent.end() > (1 << 20) + 100).unwrap();
    assert_eq!((first.start, first.end()), ((1 << 20) + 100, whole.end()));
}

#[tokio::test]
async fn bytes_are_those_of_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let (image, server) = qcow2_with_bitmap(directory.path());
    let expected = raw(&image);
    let mut client = Client::connect(&server.export(None)).await.unwrap();
    let size = client.size();
    for (offset, length) in
        [(0, size), (0, 0), (size, 0), (1, 1), (262_143, 2), (size - 513, 513), (777, 1 << 20)]
    {
        let (bytes, back) = read(client, offset, length).await;
        let (from, to) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
        assert!(bytes == expected[from..to], "{offset}+{length}");
        client = back;
    }
    assert!(matches!(client.read_stream(size, 1), Err(NbdError::OutOfRange { .. })));
}

/// A server that insists on 4096-byte blocks is asked for whole ones, and the ends are cut.
#[tokio::test]
async fn minimum_blocks_are_respected() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("sparse.img");
    run("truncate", &["--size=8M", path(&image)]);
    write(&image, &["write -P 7 1M 1M", "write -P 8 5000 3000"]);
    let options = format!(
        "driver=blkdebug,align=4096,image.driver=raw,image.file.driver=file,image.file.filename={}",
        path(&image)
    );
    let server = QemuNbd::start(directory.path(), &["--image-opts", &options]);
    let expected = raw(&image);
    let client = Client::connect(&server.export(None)).await.unwrap();
    let (bytes, client) = read(client, 5001, (1 << 20) + 77).await;
    assert!(bytes == expected[5001..5001 + (1 << 20) + 77]);

    let mut stream = client.block_status(5001).unwrap();
    let mut at = 5001;
    while let Some(extent) = stream.next().await {
        let extent = extent.unwrap();
        assert_eq!(extent.start, at);
        at = extent.end();
    }
    assert_eq!(at, 8 << 20);
    stream.into_client().unwrap().disconnect().await.unwrap();
}

#[tokio::test]
async fn extents_of_sparse_raw_are_those_nbdinfo_sees() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("sparse.img");
    run("truncate", &["--size=5G", path(&image)]);
    for start in (0..512).step_by(2) {
        write(&image, &[&format!("write -P 9 {}k 64k", start * 128)]);
    }
    write(&image, &["write -P 9 4900M 1M"]);
    let server = QemuNbd::start(directory.path(), &["--format=raw", path(&image)]);
    let zero = nbdinfo(&server, "base:allocation", |state| if_set(state & 2 != 0, Flags::ZERO));
    let expected: Vec<Extent> = extent::coalesce(extent::place(0, 5 << 30, zero)).collect();
    let (seen, _) = extents(Client::connect(&server.export(None)).await.unwrap()).await;
    assert_eq!(seen, expected);
    assert!(seen.len() > 500);
}

#[tokio::test]
async fn refusals_say_what_is_wrong() {
    let directory = tempfile::tempdir().unwrap();
    let (_, server) = qcow2_with_bitmap(directory.path());

    let error = Client::connect(&server.export(Some("b1"))).await.unwrap_err();
    assert!(
        matches!(&error, NbdError::Handshake(HandshakeError::NoBitmap { wanted, offered })
            if wanted == "b1" && offered == "b0"),
        "{error:?}"
    );
    let other = Export { name: "vdb".to_owned(), ..server.export(None) };
    let error = Client::connect(&other).await.unwrap_err();
    assert!(matches!(error, NbdError::Handshake(HandshakeError::NoExport { .. })), "{error:?}");

    let nowhere = Export {
        socket: directory.path().join("none"),
        name: String::new(),
        bitmap: None,
        changed_from: None,
    };
    assert!(matches!(Client::connect(&nowhere).await, Err(NbdError::Connect { .. })));

    let listener = tokio::net::UnixListener::bind(directory.path().join("http")).unwrap();
    let foreign = Export {
        socket: directory.path().join("http"),
        name: String::new(),
        bitmap: None,
        changed_from: None,
    };
    let answer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    };
    let (refused, ()) = tokio::join!(Client::connect(&foreign), answer);
    assert!(matches!(refused, Err(NbdError::Handshake(HandshakeError::NotNbd(_)))), "{refused:?}");
}

#[tokio::test]
async fn a_server_that_dies_is_an_error_and_the_client_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    let (_, server) = qcow2_with_bitmap(directory.path());
    let client = Client::connect(&server.export(None)).await.unwrap();
    let mut stream = client.read_stream(0, 64 << 20).unwrap();
    stream.next().await.unwrap().unwrap();
    drop(server);
    let mut last = None;
    while let Some(chunk) = stream.next().await {
        last = Some(chunk);
    }
    assert!(matches!(last, Some(Err(NbdError::Closed | NbdError::Io(_)))), "{last:?}");
    assert!(stream.into_client().is_none());
}

#[tokio::test]
async fn a_stream_cut_in_the_middle_gives_no_client_back() {
    let directory = tempfile::tempdir().unwrap();
    let (_, server) = qcow2_with_bitmap(directory.path());
    let client = Client::connect(&server.export(None)).await.unwrap();
    let mut stream = client.read_stream(0, 64 << 20).unwrap();
    stream.next().await.unwrap().unwrap();
    assert!(stream.into_client().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_a_timeout() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("silent");
    let _listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let export = Export { socket, name: String::new(), bitmap: None, changed_from: None };
    let before = tokio::time::Instant::now();
    assert!(matches!(Client::connect(&export).await, Err(NbdError::ConnectTimeout { .. })));
    assert!(before.elapsed() >= Duration::from_secs(10));
}

/// What is done to an image of 16 MiB before it has a bitmap and after, its cluster size, and from where on all counts as
/// changed. A number is a size that it is given.
type Cut = (&'static str, &'static [&'static str], &'static [&'static str], u64, u64);

#[tokio::test]
async fn behind_what_is_surely_old_all_counts_as_changed() {
    const MIB: u64 = 1 << 20;
    const FULL: &[&str] = &["write -P 1 0 16M"];
    let (cluster, small, large) = (65536, 4096, 2 * MIB);
    // the last cluster that did not change is read with the rest
    let last = |at| at - cluster;
    let table: &[Cut] = &[
        ("full, and never cut", FULL, &[], cluster, last(16 * MIB)),
        ("empty", &[], &[], cluster, 0),
        ("empty at its end", &["write -P 1 1M 1M"], &[], cluster, last(2 * MIB)),
        ("cut and grown back", FULL, &["4M", "16M"], cluster, last(4 * MIB)),
        ("and its end written", FULL, &["4M", "16M", "write -P 2 16776704 512"], cluster, last(4 * MIB)),
        ("cut between clusters", FULL, &["4195328", "16M"], cluster, 4 * MIB),
        ("changed where it was cut", FULL, &["write -P 2 3M 4M", "4M", "16M"], cluster, last(3 * MIB)),
        ("zeroes written as data", &["write -P 1 0 3M", "write -P 0 3M 13M"], &[], cluster, last(3 * MIB)),
        ("small clusters", FULL, &["4195328", "16M"], small, 4 * MIB + 4096),
        ("large clusters", FULL, &["5M", "16M"], large, 4 * MIB),
        ("large clusters, and never cut", FULL, &[], large, 14 * MIB),
    ];
    for (what, before, after, cluster, expected) in table {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.qcow2");
        let option = format!("cluster_size={cluster}");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, path(&image), "16M"]);
        write(&image, before);
        run("qemu-img", &["bitmap", "--add", path(&image), "b0"]);
        for done in *after {
            if done.contains(' ') {
                write(&image, &[done]);
            } else {
                run("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", path(&image), done]);
            }
        }
        let arguments = ["--format=qcow2", "-A", "--bitmap=b0", path(&image)];
        let server = QemuNbd::start(directory.path(), &arguments);
        let export = server.export(Some("b0"));
        let from = unsure_from(&export, *cluster).await.unwrap();
        assert_eq!(from, *expected, "{what}");

        let (told, _) = extents(Client::connect(&export).await.unwrap()).await;
        let export = Export { changed_from: Some(from), ..export };
        let (seen, _) = extents(Client::connect(&export).await.unwrap()).await;
        let raised: Vec<Extent> = extent::coalesce(extent::raise(told, from, Flags::DIRTY)).collect();
        assert_eq!(seen, raised, "{what}");
        // nothing more is read of a disk that was never cut, but for the end of a large cluster
        let read = |extents: &[Extent]| -> u64 {
            extents.iter().filter(|extent| extent.dirty() && !extent.zero()).map(|extent| extent.length).sum()
        };
        if after.is_empty() && !what.contains("zeroes") {
            assert!(read(&seen) <= *cluster, "{what}: {seen:?}");
        }
    }
}
