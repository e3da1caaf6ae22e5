//! An NBD server that is honest, and does what it is asked when the test says so: also when its client is gone, as QEMU does.
//! It has a cache for each connection, unless it says that it serves several. What a real one makes of it is in `tests/nbd_qemu_*`.
#![allow(dead_code, clippy::unwrap_used, reason = "a test rig, of which each test binary uses a part")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use virtmark::nbd::Export;
use virtmark::nbd::proto::{
    self, OptionReply, ReplyHead, Request, command, export_flag, info, option, reply,
};

/// What a server of writes can do.
pub(crate) const WRITABLE: u16 = export_flag::SEND_FLUSH | export_flag::SEND_WRITE_ZEROES;
/// No space left, as the protocol numbers it.
pub(crate) const NO_SPACE: u32 = 28;

/// Answers a client's options for an export of this size, flags and least block.
pub(crate) async fn shake_hands(
    stream: &mut UnixStream,
    size: u64,
    flags: u16,
    block: u32,
) -> std::io::Result<()> {
    let mut out = BytesMut::new();
    out.put_u64(proto::NBD_MAGIC);
    out.put_u64(proto::OPTION_MAGIC);
    out.put_u16(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
    stream.write_all(&out).await?;
    stream.read_u32().await?;
    loop {
        stream.read_u64().await?;
        let (option, length) = (stream.read_u32().await?, stream.read_u32().await?);
        stream.read_exact(&mut vec![0; length as usize]).await?;
        out.clear();
        let mut put = |kind, data: &[u8]| {
            OptionReply { option, kind, length: u32::try_from(data.len()).unwrap() }.encode(&mut out);
            out.put_slice(data);
        };
        if option == option::GO {
            let (mut export, mut blocks) = (BytesMut::new(), BytesMut::new());
            export.put_u16(info::EXPORT);
            export.put_u64(size);
            export.put_u16(flags);
            put(reply::INFO, &export);
            blocks.put_u16(info::BLOCK_SIZE);
            blocks.put_u32(block.max(1));
            blocks.put_u32(4096);
            blocks.put_u32(32 << 20);
            put(reply::INFO, &blocks);
        }
        put(if option == option::GO { reply::ACK } else { reply::ERR_UNSUPPORTED }, &[]);
        stream.write_all(&out).await?;
        if option == option::GO {
            return Ok(());
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// It is done.
    Done,
    /// It waits until another fate is told.
    Held,
    /// It fails, and nothing is written.
    Full,
    /// It is not done, and answered with a cookie that nobody knows.
    Garbled,
}

/// Tells a request's fate, by the number of its connection.
pub(crate) type Judge = fn(usize, &Request) -> Fate;

/// The server.
pub(crate) struct Fake {
    pub(crate) export: Export,
    judge: watch::Sender<Judge>,
    disk: Arc<Mutex<Disk>>,
}

/// What it has and saw.
#[derive(Default)]
struct Disk {
    size: u64,
    flags: u16,
    /// Time that each request takes.
    pause: Duration,
    bytes: Vec<u8>,
    /// The connection of each request, as they came.
    seen: Vec<(usize, Request)>,
    done: usize,
    /// Writes that were done, by their connection, and not flushed.
    unstable: Vec<usize>,
}

impl Fake {
    /// A server in `directory`. A disk of more than 64 MiB forgets what is written.
    pub(crate) fn start(directory: &Path, size: u64, flags: u16, pause: Duration, judge: Judge) -> Fake {
        let socket = directory.join("fake.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let bytes = vec![0; usize::try_from(size).unwrap().min(64 << 20)];
        let disk = Arc::new(Mutex::new(Disk { size, flags, pause, bytes, ..Disk::default() }));
        let (judge, judged) = watch::channel(judge);
        let shared = Arc::clone(&disk);
        tokio::spawn(async move {
            for number in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                tokio::spawn(talk(stream, number, Arc::clone(&shared), judged.clone()));
            }
        });
        let export = Export { socket, name: String::new(), bitmap: None, changed_from: None };
        Fake { export, judge, disk }
    }

    /// From now on requests have this fate, those that are held among them.
    pub(crate) fn judge(&self, judge: Judge) {
        self.judge.send_replace(judge);
    }

    /// The command of each request, and its connection, as they came.
    pub(crate) fn seen(&self) -> Vec<(usize, u16)> {
        self.disk.lock().unwrap().seen.iter().map(|(number, request)| (*number, request.command)).collect()
    }

    /// Requests that were done.
    pub(crate) fn done(&self) -> usize {
        self.disk.lock().unwrap().done
    }

    /// Writes that were done and would be lost with the server.
    pub(crate) fn unstable(&self) -> usize {
        self.disk.lock().unwrap().unstable.len()
    }

    /// The first bytes of the disk.
    pub(crate) fn bytes(&self, length: usize) -> Vec<u8> {
        self.disk.lock().unwrap().bytes[..length].to_vec()
    }
}

async fn talk(
    mut stream: UnixStream,
    number: usize,
    disk: Arc<Mutex<Disk>>,
    judged: watch::Receiver<Judge>,
) -> std::io::Result<()> {
    let (size, flags, pause) = {
        let disk = disk.lock().unwrap();
        (disk.size, disk.flags, disk.pause)
    };
    shake_hands(&mut stream, size, flags, 1).await?;
    let (mut input, output) = stream.into_split();
    let output = Arc::new(tokio::sync::Mutex::new(output));
    loop {
        let mut head = [0; proto::REQUEST_LEN];
        input.read_exact(&mut head).await?;
        let request = Request::decode(&head).unwrap();
        let mut data = vec![0; if request.command == command::WRITE { request.length as usize } else { 0 }];
        input.read_exact(&mut data).await?;
        if request.command == command::DISCONNECT {
            return Ok(());
        }
        disk.lock().unwrap().seen.push((number, request));
        let (disk, mut judged, output) = (Arc::clone(&disk), judged.clone(), Arc::clone(&output));
        tokio::spawn(async move {
            let judge = judged.wait_for(|judge| judge(number, &request) != Fate::Held).await;
            let Ok(fate) = judge.map(|judge| judge(number, &request)) else { return };
            tokio::time::sleep(pause).await;
            let (error, cookie) = match fate {
                Fate::Full => (NO_SPACE, request.cookie),
                Fate::Garbled => (0, !request.cookie),
                Fate::Held | Fate::Done => {
                    disk.lock().unwrap().carry_out(number, &request, &data);
                    (0, request.cookie)
                }
            };
            let mut out = BytesMut::new();
            ReplyHead::Simple { error, cookie }.encode(&mut out);
            // the client may be gone
            let _ = output.lock().await.write_all(&out).await;
        });
    }
}

impl Disk {
    fn carry_out(&mut self, number: usize, request: &Request, data: &[u8]) {
        self.done += 1;
        let start = usize::try_from(request.offset).unwrap();
        let zeroes =
            vec![0; if request.command == command::WRITE_ZEROES { request.length as usize } else { 0 }];
        let bytes = if request.command == command::WRITE { data } else { &zeroes };
        if let Some(range) = self.bytes.get_mut(start..start + bytes.len()) {
            range.copy_from_slice(bytes);
        }
        if request.command == command::FLUSH {
            let shared = self.flags & export_flag::CAN_MULTI_CONN != 0;
            self.unstable.retain(|other| !shared && *other != number);
        } else {
            self.unstable.push(number);
        }
    }
}
