//! The NBD writer against a real qemu-nbd: what it wrote is what QEMU's other tools read.

#![allow(clippy::unwrap_used, reason = "the helpers of tests, too, fail by panic")]
mod nbd_qemu_rig;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nbd_qemu_rig::{QemuNbd, path, raw, run, write};
use virtmark::nbd::{Client, NbdError, Writer, ZeroMode};

const MIB: u64 = 1 << 20;
/// No whole number of clusters.
const SIZE: u64 = 16 * MIB + 512;

fn made(directory: &Path, format: &str) -> PathBuf {
    let image = directory.join(format!("disk.{format}"));
    run("qemu-img", &["create", "-q", "-f", format, path(&image), &SIZE.to_string()]);
    image
}

async fn writer(server: &QemuNbd) -> Writer {
    Client::connect_to_write(&server.export(None)).await.unwrap().writer().unwrap()
}

/// Bytes that tell where they belong.
fn pattern(offset: u64, length: u64) -> Vec<u8> {
    (offset..offset + length).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[3] | 1).collect()
}

fn place(range: std::ops::Range<u64>) -> std::ops::Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

#[tokio::test]
async fn what_is_written_is_what_others_read() {
    for format in ["raw", "qcow2"] {
        let directory = tempfile::tempdir().unwrap();
        let image = made(directory.path(), format);
        let server = QemuNbd::writable(directory.path(), &["--format", format, path(&image)]);
        let mut writer = writer(&server).await;
        assert_eq!(writer.size(), SIZE);
        let mut model = vec![0; usize::try_from(SIZE).unwrap()];
        // of no alignment, over each other, up to the odd end
        for (offset, length) in [(1, 1), (511, 3), (0, 3 * MIB + 7), (MIB - 5, 900_000), (SIZE - 513, 513)] {
            for (at, piece) in (offset..).step_by(70_001).zip(pattern(offset, length).chunks(70_001)) {
                writer.write(at, piece).await.unwrap();
            }
            model[place(offset..offset + length)].copy_from_slice(&pattern(offset, length));
        }
        for (offset, length, mode) in [
            (77, 5000, ZeroMode::Punch),
            (MIB, 65536, ZeroMode::Allocate),
            (SIZE - 100, 100, ZeroMode::Punch),
        ] {
            writer.zero(offset, length, mode).await.unwrap();
            model[place(offset..offset + length)].fill(0);
        }
        writer.flush().await.unwrap();
        let client = writer.finish().await.unwrap();

        // the same connection reads what it wrote
        let mut stream = client.read_stream(0, SIZE).unwrap();
        let mut seen = Vec::new();
        while let Some(chunk) = stream.next().await {
            seen.extend_from_slice(&chunk.unwrap());
        }
        assert!(seen == model, "{format}");
        stream.into_client().unwrap().disconnect().await.unwrap();
        drop(server);
        let file = if format == "raw" { std::fs::read(&image).unwrap() } else { raw(&image) };
        assert!(file == model, "{format}");
    }
}

/// Storage with blocks of 4 KiB: QEMU does what a client cannot, also when two write to one block.
#[tokio::test]
async fn blocks_of_the_storage_are_its_servers_affair() {
    let directory = tempfile::tempdir().unwrap();
    let image = made(directory.path(), "raw");
    run("truncate", &["--size=16M", path(&image)]);
    let options = format!(
        "driver=blkdebug,align=4096,image.driver=raw,image.file.driver=file,image.file.filename={}",
        path(&image)
    );
    let server = QemuNbd::writable(directory.path(), &["--image-opts", &options]);
    let (mut one, mut two) = (writer(&server).await, writer(&server).await);
    for at in (0..200_000_u64).step_by(1000) {
        let mine = if at / 1000 % 2 == 0 { &mut one } else { &mut two };
        mine.write(at, &pattern(at, 1000)).await.unwrap();
    }
    let (one, two) = tokio::join!(one.finish(), two.finish());
    assert!(one.is_ok() && two.is_ok());
    let seen = std::fs::read(&image).unwrap();
    for at in (0..200_000_u64).step_by(1000) {
        assert!(seen[place(at..at + 1000)] == pattern(at, 1000), "at {at}");
    }
    // a client that says that it obeys blocks has to
    let client = Client::connect(&server.export(None)).await.unwrap();
    let mut obeying = client.writer().unwrap();
    obeying.write(1, &[1]).await.unwrap();
    assert!(matches!(obeying.drain().await, Err(NbdError::Unaligned { block: 4096, .. })));
}

#[tokio::test]
async fn zeroes_are_holes_only_where_they_may_be() {
    let directory = tempfile::tempdir().unwrap();
    let image = made(directory.path(), "raw");
    write(&image, &["write -P 7 0 16M"]);
    let blocks = || std::fs::metadata(&image).unwrap().blocks() * 512;
    let server = QemuNbd::writable(directory.path(), &["--format=raw", path(&image)]);
    let mut writer = writer(&server).await;
    let before = blocks();
    writer.zero(0, 4 * MIB, ZeroMode::Allocate).await.unwrap();
    writer.flush().await.unwrap();
    assert!(blocks() >= before, "{} of {before}", blocks());
    writer.zero(8 * MIB, 4 * MIB, ZeroMode::Punch).await.unwrap();
    writer.flush().await.unwrap();
    assert!(blocks() <= before - 4 * MIB, "{} of {before}", blocks());
    let seen = std::fs::read(&image).unwrap();
    for (range, byte) in [(0..4, 0), (4..8, 7), (8..12, 0), (12..16, 7)] {
        assert!(
            seen[place(range.start * MIB..range.end * MIB)].iter().all(|seen| *seen == byte),
            "{range:?}"
        );
    }
}

#[tokio::test]
async fn what_the_storage_refuses_is_an_error_in_its_words() {
    let directory = tempfile::tempdir().unwrap();
    let image = made(directory.path(), "raw");
    let readers = QemuNbd::start(directory.path(), &["--format=raw", path(&image)]);
    let client = Client::connect_to_write(&readers.export(None)).await.unwrap();
    assert!(matches!(client.writer(), Err(NbdError::ReadOnly)));
    drop(readers);

    let options = format!(
        "driver=raw,file.driver=blkdebug,file.inject-error.0.event=write_aio,file.inject-error.0.errno=28,\
         file.inject-error.0.sector=4096,file.image.driver=file,file.image.filename={}",
        path(&image)
    );
    let server = QemuNbd::writable(directory.path(), &["--image-opts", &options]);
    let mut writer = writer(&server).await;
    writer.write(0, &pattern(0, MIB)).await.unwrap();
    writer.drain().await.unwrap();
    let error = async {
        writer.write(MIB, &pattern(MIB, 4 * MIB)).await?;
        writer.flush().await
    };
    let error = error.await.unwrap_err();
    let NbdError::Server { what: "write", offset, error } = error else { panic!("{error:?}") };
    assert_eq!((offset, error.errno), (2 * MIB, 28));
}

#[tokio::test]
async fn a_server_that_dies_is_an_error_and_no_client_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let image = made(directory.path(), "qcow2");
    let server = QemuNbd::writable(directory.path(), &["--format=qcow2", path(&image)]);
    let mut writer = writer(&server).await;
    writer.write(0, &pattern(0, MIB)).await.unwrap();
    drop(server);
    let error = writer.flush().await.unwrap_err();
    assert!(matches!(error, NbdError::Closed | NbdError::Io(_)), "{error:?}");
    assert!(matches!(writer.finish().await, Err(NbdError::GivenUp)));
}
