//! Reads the image server's list of extents as it comes, however long it is. It holds one extent, and never guesses: a list
//! with a gap, or that is cut off, is an error.

use serde::Deserialize;

use super::manifest::ReadMode;
use crate::extent::{Extent, Flags};

/// Longest text of one extent.
const LONGEST: usize = 512;

/// Why a list of extents cannot be believed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtentsError {
    /// No JSON of that form.
    #[error("it is not a list of extents at byte {0}; is this an image server?")]
    Malformed(u64),
    /// An extent does not begin where the one before ended.
    #[error("it has a gap or an overlap at offset {0}; try again, and report it")]
    Gap(u64),
    /// It ended too early.
    #[error("it was cut off at offset {0}; try again")]
    CutOff(u64),
    /// It is of a disk of another size.
    #[error("it covers {covered} bytes, and the disk has {size}; report it")]
    Size {
        /// Bytes that it covers.
        covered: u64,
        /// Bytes of the disk, as its VmBackup says.
        size: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Before,
    Between,
    Inside,
    After,
}

/// A list that is being read.
#[derive(Debug)]
pub struct Parser {
    mode: ReadMode,
    place: Place,
    text: Vec<u8>,
    seen: u64,
    end: u64,
}

#[derive(Deserialize)]
struct Told {
    start: u64,
    length: u64,
    #[serde(default)]
    zero: bool,
    #[serde(default)]
    hole: bool,
    /// A list of what changed that does not say it changed nothing, if this were false without being told.
    dirty: Option<bool>,
}

impl Parser {
    /// Of a disk that is read in this mode: what is needed for that must be told.
    #[must_use]
    pub fn new(mode: ReadMode) -> Self {
        Self { mode, place: Place::Before, text: Vec::with_capacity(LONGEST), seen: 0, end: 0 }
    }

    /// Takes the next bytes; gives each extent that is whole to `each`.
    ///
    /// # Errors
    /// When it is no list of extents, or has a gap.
    pub fn push(&mut self, bytes: &[u8], mut each: impl FnMut(Extent)) -> Result<(), ExtentsError> {
        for byte in bytes {
            self.seen += 1;
            match (self.place, byte) {
                (Place::Inside, b'}') => {
                    self.text.push(b'}');
                    each(self.take()?);
                    self.text.clear();
                    self.place = Place::Between;
                }
                (Place::Inside, byte) if self.text.len() < LONGEST => self.text.push(*byte),
                (Place::Before | Place::Between | Place::After, b' ' | b'\n' | b'\r' | b'\t')
                | (Place::Between, b',') => {}
                (Place::Before, b'[') => self.place = Place::Between,
                (Place::Between, b'{') => {
                    self.text.push(b'{');
                    self.place = Place::Inside;
                }
                (Place::Between, b']') => self.place = Place::After,
                _ => return Err(ExtentsError::Malformed(self.seen)),
            }
        }
        Ok(())
    }

    fn take(&mut self) -> Result<Extent, ExtentsError> {
        let told: Told =
            serde_json::from_slice(&self.text).map_err(|_| ExtentsError::Malformed(self.seen))?;
        let end = told.start.checked_add(told.length).ok_or(ExtentsError::Gap(told.start))?;
        if told.start != self.end || told.length == 0 {
            return Err(ExtentsError::Gap(self.end));
        }
        self.end = end;
        if self.mode == ReadMode::Incremental && told.dirty.is_none() {
            return Err(ExtentsError::Malformed(self.seen));
        }
        let flag = |holds: bool, flag: Flags| if holds { flag } else { Flags::DATA };
        let flags = flag(told.zero, Flags::ZERO)
            .union(flag(told.hole, Flags::HOLE))
            .union(flag(told.dirty == Some(true), Flags::DIRTY));
        Ok(Extent { start: told.start, length: told.length, flags })
    }

    /// The size of the disk in bytes, once the list is whole; it must be `size`, where that is known.
    ///
    /// # Errors
    /// When it was cut off, or is of a disk of another size.
    pub fn finish(self, size: Option<u64>) -> Result<u64, ExtentsError> {
        match size {
            _ if self.place != Place::After => Err(ExtentsError::CutOff(self.end)),
            Some(size) if size != self.end => Err(ExtentsError::Size { covered: self.end, size }),
            _ => Ok(self.end),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "[{\"start\": 0, \"length\": 65536, \"dirty\": true, \"zero\": false}, \
        {\"start\": 65536, \"length\": 512, \"dirty\": true, \"zero\": true}]\n";

    fn read(text: &str, piece: usize) -> Result<(Vec<Extent>, u64), ExtentsError> {
        let mut parser = Parser::new(ReadMode::Incremental);
        let mut found = Vec::new();
        for bytes in text.as_bytes().chunks(piece.max(1)) {
            parser.push(bytes, |extent| found.push(extent))?;
        }
        parser.finish(None).map(|size| (found, size))
    }

    #[test]
    fn a_list_is_read_however_it_is_cut() {
        let whole = read(LIST, LIST.len()).unwrap();
        assert_eq!(whole.1, 66048);
        assert_eq!(whole.0[0], Extent { start: 0, length: 65536, flags: Flags::DIRTY });
        assert_eq!(whole.0[1].flags, Flags::DIRTY.union(Flags::ZERO));
        for piece in 1..LIST.len() {
            assert_eq!(read(LIST, piece), Ok(whole.clone()));
        }
        assert_eq!(read("[]", 1), Ok((vec![], 0)));
    }

    #[test]
    fn a_list_that_is_cut_off_anywhere_is_refused() {
        for end in 0..LIST.trim_end().len() {
            assert!(read(&LIST[..end], 7).is_err(), "{end}");
        }
    }

    #[test]
    fn gaps_overlaps_and_other_texts_are_refused() {
        let rows = [
            ("[{\"start\": 1, \"length\": 2, \"dirty\": true}]", ExtentsError::Gap(0)),
            (
                "[{\"start\": 0, \"length\": 2, \"dirty\": true}, {\"start\": 1, \"length\": 2}]",
                ExtentsError::Gap(2),
            ),
            ("[{\"start\": 0, \"length\": 0}]", ExtentsError::Gap(0)),
            ("{\"error\": 1}", ExtentsError::Malformed(1)),
            ("[{\"start\": -1, \"length\": 2}]", ExtentsError::Malformed(27)),
            ("[] []", ExtentsError::Malformed(4)),
            ("", ExtentsError::CutOff(0)),
        ];
        for (text, error) in rows {
            assert_eq!(read(text, 5), Err(error), "{text}");
        }
        let long = format!("[{{{}", " ".repeat(LONGEST + 1));
        assert!(matches!(read(&long, 64), Err(ExtentsError::Malformed(_))));
    }

    #[test]
    fn what_is_not_told_is_not_taken_for_unchanged() {
        let list = "[{\"start\": 0, \"length\": 512, \"zero\": false, \"hole\": false}]";
        let read = |mode: ReadMode| {
            let mut parser = Parser::new(mode);
            parser.push(list.as_bytes(), |_| ()).and_then(|()| parser.finish(None))
        };
        assert!(matches!(read(ReadMode::Incremental), Err(ExtentsError::Malformed(_))));
        assert_eq!(read(ReadMode::Full), Ok(512), "a full one needs no more");
    }

    #[test]
    fn a_list_of_less_or_more_than_the_disk_is_refused() {
        let finish = |size: Option<u64>| {
            let mut parser = Parser::new(ReadMode::Incremental);
            parser.push(LIST.as_bytes(), |_| ()).and_then(|()| parser.finish(size))
        };
        assert_eq!(finish(None), Ok(66048));
        assert_eq!(finish(Some(66048)), Ok(66048));
        for size in [0, 65536, 66049] {
            assert_eq!(finish(Some(size)), Err(ExtentsError::Size { covered: 66048, size }));
        }
    }
}
