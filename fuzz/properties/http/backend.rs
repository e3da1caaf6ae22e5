//! An honest NBD server of one disk, as small as the client lets it be.

use std::sync::OnceLock;

use bytes::{BufMut as _, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use virtmark::nbd::proto::{self, OptionReply, ReplyHead, Request, chunk, command, info, option, reply};

/// Bytes of the disk: more than the ticket permits.
const SIZE: u64 = 12_288;

/// What the disk has.
pub(super) fn disk() -> &'static [u8] {
    static DISK: OnceLock<Vec<u8>> = OnceLock::new();
    DISK.get_or_init(|| (0..SIZE).map(|at| (at.wrapping_mul(31) >> 3).to_le_bytes()[0] | 1).collect())
}

pub(super) async fn serve(listener: UnixListener) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            // the client may go at any time
            let _ = talk(stream).await;
        });
    }
}

async fn talk(mut stream: UnixStream) -> std::io::Result<()> {
    let mut out = BytesMut::new();
    out.put_u64(proto::NBD_MAGIC);
    out.put_u64(proto::OPTION_MAGIC);
    out.put_u16(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
    stream.write_all(&out).await?;
    stream.read_u32().await?;
    loop {
        stream.read_u64().await?;
        let (option, length) = (stream.read_u32().await?, stream.read_u32().await?);
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data).await?;
        out.clear();
        match option {
            option::SET_META_CONTEXT => {
                put(&mut out, option, reply::META_CONTEXT, b"\0\0\0\x01base:allocation");
                put(&mut out, option, reply::META_CONTEXT, b"\0\0\0\x02qemu:dirty-bitmap:b0");
            }
            option::GO => {
                let mut data = BytesMut::new();
                data.put_u16(info::EXPORT);
                data.put_u64(SIZE);
                data.put_u16(proto::export_flag::SEND_DF);
                put(&mut out, option, reply::INFO, &data);
            }
            _ => {}
        }
        put(&mut out, option, reply::ACK, &[]);
        stream.write_all(&out).await?;
        if option == option::GO {
            break;
        }
    }
    let mut request = [0; proto::REQUEST_LEN];
    loop {
        stream.read_exact(&mut request).await?;
        let Some(Request { command, cookie, offset, length, .. }) = Request::decode(&request) else {
            return Ok(());
        };
        out.clear();
        match command {
            command::READ => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let Some(data) = start.checked_add(length as usize).and_then(|end| disk().get(start..end))
                else {
                    return Ok(());
                };
                answer(
                    &mut out,
                    true,
                    chunk::OFFSET_DATA,
                    cookie,
                    &[&offset.to_be_bytes()[..], data].concat(),
                );
            }
            command::BLOCK_STATUS => {
                for (id, state, last) in [(1_u32, 2_u32, false), (2, 1, true)] {
                    let runs = [(4096, state), (length - 4096, 0)];
                    let runs =
                        runs.iter().flat_map(|(length, state)| [length.to_be_bytes(), state.to_be_bytes()]);
                    let map: Vec<u8> = id.to_be_bytes().into_iter().chain(runs.flatten()).collect();
                    answer(&mut out, last, chunk::BLOCK_STATUS, cookie, &map);
                }
            }
            _ => return Ok(()),
        }
        stream.write_all(&out).await?;
    }
}

fn put(out: &mut BytesMut, option: u32, kind: u32, data: &[u8]) {
    let length = u32::try_from(data.len()).expect("little");
    OptionReply { option, kind, length }.encode(out);
    out.put_slice(data);
}

fn answer(out: &mut BytesMut, done: bool, kind: u16, cookie: u64, payload: &[u8]) {
    let (flags, length) =
        (if done { chunk::FLAG_DONE } else { 0 }, u32::try_from(payload.len()).expect("little"));
    ReplyHead::Chunk { flags, kind, cookie, length }.encode(out);
    out.put_slice(payload);
}
