//! One comparison: the same requests to both servers.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::case::{Names, Request, folder};
use crate::compare::{Difference, Rules, differences};
use crate::exchange::{Exchange, Script, Transport, play};
use crate::image_server_rig::python;
use crate::servers::{self, Running};
use crate::world::World;

/// A program that runs another server than ours, see README.md.
const PROGRAM: &str = "VIRTMARK_CONFORMANCE_SERVER";
/// A file of that server's deliberate differences.
const DIFFERENCES: &str = "VIRTMARK_CONFORMANCE_DIFFERENCES";

/// Both servers, before one world.
pub(crate) struct Suite {
    pub(crate) rules: Rules,
    stock: (Running, Names),
    other: (Running, Names),
    vendor: bool,
    world: World,
    /// Held by who writes to the disks, until they were compared.
    writing: Mutex<()>,
}

impl Suite {
    /// Against ours, or the server that the environment names.
    pub(crate) fn start() -> Suite {
        match std::env::var(PROGRAM) {
            Ok(program) => Suite::against(Some(&program), std::env::var_os(DIFFERENCES).map(PathBuf::from)),
            Err(_) => Suite::against(None, Some(folder().join("differences.yaml"))),
        }
    }

    /// The stock daemon against itself, as a vendor's server.
    pub(crate) fn of_stock_alone() -> Suite {
        let (python, script) = (python(), folder().join("stock-server.py"));
        Suite::against(Some(&format!("'{}' '{}'", python.display(), script.display())), None)
    }

    fn against(program: Option<&str>, differences: Option<PathBuf>) -> Suite {
        let world = World::make();
        let stock = servers::stock(&world);
        let other = match program {
            None => servers::ours(&world),
            Some(program) => servers::vendor(program, &world),
        };
        let rules = differences.map_or(Rules(Vec::new()), |file| Rules::read(&file));
        let named = |server: &Running| {
            let mut names = world.names.clone();
            if let Some(socket) = &server.endpoint.unix {
                names.0.insert("socket".to_owned(), socket.to_string_lossy().into_owned());
            }
            names
        };
        let (stock_names, other_names) = (named(&stock), named(&other));
        let vendor = program.is_some();
        Suite {
            rules,
            stock: (stock, stock_names),
            other: (other, other_names),
            vendor,
            world,
            writing: Mutex::default(),
        }
    }

    /// The other server is ours.
    pub(crate) fn is_ours(&self) -> bool {
        !self.vendor
    }

    /// The transports that both servers have.
    pub(crate) fn transports(&self) -> Vec<Transport> {
        let other = &self.other.0.endpoint;
        let has = [(Transport::Tls, other.tls.is_some()), (Transport::Unix, other.unix.is_some())];
        has.into_iter().filter(|(_, has)| *has).map(|(transport, _)| transport).collect()
    }

    /// Plays the requests on both servers; of the rules, only the named ones count, when some are named.
    pub(crate) fn compare(
        &self,
        transport: Transport,
        requests: &[Request],
        pipelined: bool,
        end: bool,
        named: Option<&BTreeSet<String>>,
    ) -> Compared {
        let requests: Vec<_> = requests.iter().map(|request| request.bytes(&self.world.names)).collect();
        let script = Script { requests, pipelined, end };
        let writes = script.requests.iter().any(|request| self.world.writes(request));
        let alone = writes.then(|| self.writing.lock().unwrap_or_else(PoisonError::into_inner));
        if writes {
            self.world.twins.reset();
        }
        let stock = play(&self.stock.0.endpoint, transport, &script);
        let other = play(&self.other.0.endpoint, transport, &script);
        let mut found = differences((&stock, &self.stock.1), (&other, &self.other.1));
        if writes {
            let [stock, other] = self.world.twins.summaries();
            let answer = script.requests.len();
            let disks = Difference { answer, aspect: "disk".to_owned(), stock, other };
            found.extend((disks.stock != disks.other).then_some(disks));
        }
        drop(alone);
        let text: String = script.requests.concat().iter().map(|byte| char::from(*byte)).collect();
        let request = self.world.names.hide(&text);
        let (unexplained, used) = self.rules.explain(&request, transport, named, &found);
        let (_, explaining) = self.rules.explain(&request, transport, None, &unexplained);
        Compared { request, stock, unexplained, explaining, used }
    }
}

/// What a comparison found.
pub(crate) struct Compared {
    /// As sent, with names for what is secret.
    pub(crate) request: String,
    pub(crate) stock: Exchange,
    pub(crate) unexplained: Vec<Difference>,
    /// Rules that were not named, and explain some of that.
    explaining: BTreeSet<String>,
    pub(crate) used: BTreeSet<String>,
}

impl Compared {
    /// What is wrong, in words.
    pub(crate) fn complaint(&self, transport: Transport) -> Option<String> {
        if self.unexplained.is_empty() {
            return None;
        }
        let mut text = format!("{transport:?}: {}", shown(&self.request));
        for Difference { answer, aspect, stock, other } in &self.unexplained {
            let (stock, other) = (shown(stock), shown(other));
            write!(text, "\n    answer {answer}, {aspect}: the stock daemon has {stock}, the other {other}")
                .unwrap();
        }
        if !self.explaining.is_empty() {
            write!(text, "\n    listed differences that explain some of it: {:?}", self.explaining).unwrap();
        }
        Some(text)
    }
}

/// A text in one line that is not too long.
fn shown(text: &str) -> String {
    const LONGEST: usize = 600;
    let text = format!("{text:?}");
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}... ({} characters)", &text[..end], text.chars().count()),
        None => text,
    }
}
