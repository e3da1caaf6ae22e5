use proptest::prelude::*;

use super::*;

/// A server's side of a handshake that ends well.
fn script(bitmap: bool) -> Vec<u8> {
    let mut out = BytesMut::new();
    out.put_u64(proto::NBD_MAGIC);
    out.put_u64(proto::OPTION_MAGIC);
    out.put_u16(proto::FLAG_FIXED_NEWSTYLE | proto::FLAG_NO_ZEROES);
    answer(&mut out, option::STRUCTURED_REPLY, reply::ACK, &[]);
    let set = |out: &mut BytesMut, id: u32, name: &str| {
        let data = [&id.to_be_bytes(), name.as_bytes()].concat();
        answer(out, option::SET_META_CONTEXT, reply::META_CONTEXT, &data);
    };
    set(&mut out, 7, proto::BASE_ALLOCATION);
    if bitmap {
        set(&mut out, 9, "qemu:dirty-bitmap:b0");
    }
    answer(&mut out, option::SET_META_CONTEXT, reply::ACK, &[]);
    let mut data = BytesMut::new();
    data.put_u16(info::EXPORT);
    data.put_u64(1 << 30);
    data.put_u16(proto::export_flag::SEND_DF);
    answer(&mut out, option::GO, reply::INFO, &data);
    data.clear();
    data.put_u16(info::BLOCK_SIZE);
    data.put_u32(512);
    data.put_u32(4096);
    data.put_u32(32 << 20);
    answer(&mut out, option::GO, reply::INFO, &data);
    answer(&mut out, option::GO, reply::ACK, &[]);
    out.to_vec()
}

fn answer(out: &mut BytesMut, option: u32, kind: u32, data: &[u8]) {
    OptionReply { option, kind, length: u32::try_from(data.len()).unwrap() }.encode(out);
    out.put_slice(data);
}

fn greeted(export: &str, bitmap: Option<&str>) -> Handshake {
    let mut machine = Handshake::new(export, bitmap);
    assert_eq!(machine.receive(&script(false)[..proto::GREETING_LEN]), Ok(None));
    machine
}

proptest! {
    #[test]
    fn any_split_agrees_on_the_same(cuts in proptest::collection::vec(1..40usize, 1..60)) {
        let script = script(true);
        let mut machine = Handshake::new("vda", Some("b0"));
        let (mut at, mut agreed, mut sent) = (0, None, Vec::new());
        for cut in cuts.into_iter().chain(std::iter::repeat(script.len())) {
            let end = script.len().min(at + cut);
            agreed = machine.receive(&script[at..end]).unwrap();
            sent.extend_from_slice(&machine.output());
            at = end;
            if at == script.len() {
                break;
            }
        }
        let mut whole = Handshake::new("vda", Some("b0"));
        prop_assert_eq!(&whole.receive(&script).unwrap(), &agreed);
        prop_assert_eq!(&whole.output()[..], &sent[..]);
        let agreed = agreed.unwrap();
        prop_assert_eq!(agreed.size, 1 << 30);
        prop_assert_eq!(agreed.contexts, Contexts { allocation: Some(7), depth: None, dirty: Some(9) });
        prop_assert_eq!((agreed.minimum_block, agreed.maximum_block), (512, 32 << 20));
    }

    #[test]
    fn hostile_bytes_never_panic_nor_are_hoarded(bytes: Vec<u8>, keep in 0..200usize) {
        let mut script = script(true);
        script.truncate(keep);
        script.extend_from_slice(&bytes);
        let mut machine = Handshake::new("vda", Some("b0"));
        let _ = machine.receive(&script);
        prop_assert!(machine.input.capacity() <= 2 * script.len() + 64);
    }
}

#[test]
fn a_missing_bitmap_is_named_with_those_that_exist() {
    let mut machine = greeted("vda", Some("b1"));
    let mut out = BytesMut::new();
    answer(&mut out, option::STRUCTURED_REPLY, reply::ACK, &[]);
    answer(&mut out, option::SET_META_CONTEXT, reply::ACK, &[]);
    answer(&mut out, option::LIST_META_CONTEXT, reply::META_CONTEXT, b"\0\0\0\0qemu:dirty-bitmap:b0");
    answer(&mut out, option::LIST_META_CONTEXT, reply::ACK, &[]);
    let error = machine.receive(&out).unwrap_err();
    assert_eq!(error, HandshakeError::NoBitmap { wanted: "b1".to_owned(), offered: "b0".to_owned() });
}

#[test]
fn who_writes_says_nothing_of_blocks() {
    let go = |machine: Handshake| {
        let mut machine = machine;
        let mut out = script(false)[..proto::GREETING_LEN].to_vec();
        let mut refused = BytesMut::new();
        answer(&mut refused, option::STRUCTURED_REPLY, reply::ERR_UNSUPPORTED, &[]);
        out.extend_from_slice(&refused);
        assert_eq!(machine.receive(&out), Ok(None));
        machine.output().to_vec()
    };
    let asked = go(Handshake::new("vda", None));
    assert!(asked.ends_with(b"\0\0\0\x03vda\0\x01\0\x03"), "{asked:?}");
    let left = go(Handshake::new("vda", None).any_alignment());
    assert!(left.ends_with(b"\0\0\0\x03vda\0\0"), "{left:?}");
}

#[test]
fn contexts_before_an_error_are_not_agreed_on() {
    let mut machine = greeted("", None);
    let mut out = BytesMut::new();
    answer(&mut out, option::STRUCTURED_REPLY, reply::ACK, &[]);
    // with one id, too, which is only looked at when the option succeeds
    answer(&mut out, option::SET_META_CONTEXT, reply::META_CONTEXT, b"\0\0\0\x07base:allocation");
    answer(&mut out, option::SET_META_CONTEXT, reply::META_CONTEXT, b"\0\0\0\x07qemu:allocation-depth");
    answer(&mut out, option::SET_META_CONTEXT, reply::ERR_UNKNOWN, &[]);
    answer(&mut out, option::GO, reply::INFO, &[0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 1]);
    answer(&mut out, option::GO, reply::ACK, &[]);
    let agreed = machine.receive(&out).unwrap().unwrap();
    assert_eq!(agreed.contexts, Contexts::default());
}

#[test]
fn an_old_server_gives_simple_replies() {
    let mut machine = greeted("", None);
    let mut out = BytesMut::new();
    answer(&mut out, option::STRUCTURED_REPLY, reply::ERR_UNSUPPORTED, b"what?");
    answer(&mut out, option::GO, reply::INFO, &[0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 1]);
    answer(&mut out, option::GO, reply::ACK, &[]);
    let agreed = machine.receive(&out).unwrap().unwrap();
    assert_eq!((agreed.size, agreed.structured), (1024, false));
}

#[test]
fn refusals_are_told_apart() {
    let mut out = BytesMut::new();
    answer(&mut out, option::STRUCTURED_REPLY, reply::ERR_UNSUPPORTED, &[]);
    answer(&mut out, option::GO, reply::ERR_UNKNOWN, b"export\n'x' not present");
    let error = greeted("x", None).receive(&out).unwrap_err();
    let message = "export 'x' not present".to_owned();
    assert_eq!(error, HandshakeError::NoExport { name: "x".to_owned(), message });

    let mut out = BytesMut::new();
    answer(&mut out, option::STRUCTURED_REPLY, reply::ERR_TLS_REQUIRED, &[]);
    assert_eq!(greeted("x", None).receive(&out), Err(HandshakeError::TlsRequired));

    let error = Handshake::new("", None).receive(b"HTTP/1.1 400 Bad").unwrap_err();
    assert!(matches!(error, HandshakeError::NotNbd(_)));

    let mut out = BytesMut::new();
    OptionReply { option: option::STRUCTURED_REPLY, kind: reply::ACK, length: u32::MAX }.encode(&mut out);
    assert!(matches!(greeted("x", None).receive(&out), Err(HandshakeError::Protocol(_))));
}
