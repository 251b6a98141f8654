//! Reads a request target: which key, which query, and whether it names a service instead. Pure.
//!
//! The key is the path without its first slash, percent-decoded once: any bytes, `..` and empty segments included. It
//! is compared decoded with what is reserved: the prefixes `api/ v1/ v2/ v3/ raft/ ui/`, and the names `metrics livez
//! readyz version status` exactly (`metrics/x` and `metricsx` are keys).

use std::borrow::Cow;

use hyper::Uri;

use super::reply::Refusal;
use crate::command::KEY_BYTES_MAX;
use crate::kv::{self, Consistency};

const PREFIXES: [&[u8]; 6] = [b"api/", b"v1/", b"v2/", b"v3/", b"raft/", b"ui/"];

/// For people, in a refusal.
pub const RESERVED: &str = "api/… v1/… v2/… v3/… raft/… ui/… metrics livez readyz version status";

/// What a decoded path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Key,
    Service(Service),
    /// Under a reserved prefix, where nothing lives yet.
    Reserved,
}

/// What the node tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    Metrics,
    Livez,
    Readyz,
    Version,
    Status,
}

pub fn place(key: &[u8]) -> Place {
    match key {
        b"metrics" => Place::Service(Service::Metrics),
        b"livez" => Place::Service(Service::Livez),
        b"readyz" => Place::Service(Service::Readyz),
        b"version" => Place::Service(Service::Version),
        b"status" => Place::Service(Service::Status),
        _ if PREFIXES.iter().any(|prefix| key.starts_with(prefix)) => Place::Reserved,
        _ => Place::Key,
    }
}

/// The key that a target names, 1 to [`KEY_BYTES_MAX`] bytes.
pub fn key(uri: &Uri) -> Result<Cow<'_, [u8]>, Refusal> {
    let Some(path) = uri.path().strip_prefix('/') else {
        return Err(Refusal::bad_request("the request target has no path"));
    };
    let key = decode(path.as_bytes()).ok_or_else(|| {
        Refusal::bad_request("malformed percent escape in the key; a percent sign itself is written %25")
    })?;
    match key.len() {
        0 => Err(Refusal::read(kv::Error::EmptyKey)),
        1..=KEY_BYTES_MAX => Ok(key),
        _ => Err(Refusal::read(kv::Error::KeyTooLong { max: KEY_BYTES_MAX })),
    }
}

/// How fresh a read is asked to be. A name or value that is not known is refused, for whoever mistypes must not get
/// something else in silence.
pub fn consistency(query: Option<&str>) -> Result<Consistency, Refusal> {
    let mut asked = None;
    for (name, value) in parameters(query) {
        let this = match (name, value) {
            ("consistency", "linearizable") => Consistency::Linearizable,
            ("consistency", "stale") => Consistency::Stale,
            ("consistency", _) => {
                let reason = format!("consistency is linearizable or stale, not {}", quoted(value));
                return Err(Refusal::bad_request(reason));
            }
            _ => return Err(unknown(name)),
        };
        if asked.replace(this).is_some_and(|earlier| earlier != this) {
            return Err(Refusal::bad_request("consistency is given twice, and not the same"));
        }
    }
    Ok(asked.unwrap_or(Consistency::Linearizable))
}

/// Refuses any parameter.
pub fn no_parameters(query: Option<&str>) -> Result<(), Refusal> {
    match parameters(query).next() {
        Some((name, _)) => Err(unknown(name)),
        None => Ok(()),
    }
}

fn parameters(query: Option<&str>) -> impl Iterator<Item = (&str, &str)> {
    let pairs = query.unwrap_or("").split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

fn unknown(name: &str) -> Refusal {
    let name = quoted(name);
    Refusal::bad_request(format!("unknown query parameter {name} for this method; a question mark in a key is %3F"))
}

/// A client's text in a one-line answer.
fn quoted(text: &str) -> String {
    format!("'{}'", text.chars().take(64).flat_map(char::escape_debug).collect::<String>())
}

/// The bytes of a path, each `%` and two hexadecimal digits being one of them; nothing if an escape is malformed. Borrows
/// where there is nothing to decode.
fn decode(path: &[u8]) -> Option<Cow<'_, [u8]>> {
    let Some(plain) = path.iter().position(|&byte| byte == b'%') else {
        return Some(Cow::Borrowed(path));
    };
    let mut key = Vec::with_capacity(path.len());
    let (head, mut rest) = path.split_at(plain);
    key.extend_from_slice(head);
    while let Some((&byte, after)) = rest.split_first() {
        if byte == b'%' {
            let (&[high, low], tail) = after.split_first_chunk::<2>()?;
            key.push(hex(high)? << 4 | hex(low)?);
            rest = tail;
        } else {
            key.push(byte);
            rest = after;
        }
    }
    Some(Cow::Owned(key))
}

fn hex(digit: u8) -> Option<u8> {
    (digit as char).to_digit(16).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn escapes_are_decoded_once_and_strictly() {
        let cases: [(&str, Option<&[u8]>); 11] = [
            ("", Some(b"")),
            ("a/../b//c", Some(b"a/../b//c")),
            ("%00", Some(&[0])),
            ("%ff%FE", Some(&[0xff, 0xfe])),
            ("%2541", Some(b"%41")),
            ("a%2Fb+c", Some(b"a/b+c")),
            ("%", None),
            ("%4", None),
            ("a%zz", None),
            ("%+1", None),
            ("%%41", None),
        ];
        for (path, key) in cases {
            assert_eq!(decode(path.as_bytes()).as_deref(), key, "{path}");
        }
    }

    #[test]
    fn what_is_reserved_is_so_however_it_is_written() {
        let named = |path: &str| place(&key(&path.parse().unwrap()).unwrap());
        assert_eq!(named("/metrics"), Place::Service(Service::Metrics));
        assert_eq!(named("/%6detrics"), Place::Service(Service::Metrics));
        assert_eq!(named("/%61pi/v1"), Place::Reserved);
        assert_eq!(named("/raft/stream"), Place::Reserved);
        for key in ["/metricsx", "/metrics/", "/api", "//api/", "/v4/", "/API/", "/x/api/"] {
            assert_eq!(named(key), Place::Key, "{key}");
        }
    }

    #[test]
    fn a_query_is_understood_or_refused() {
        for query in [None, Some(""), Some("consistency=linearizable"), Some("&consistency=linearizable&")] {
            assert_eq!(consistency(query).unwrap(), Consistency::Linearizable, "{query:?}");
        }
        assert_eq!(consistency(Some("consistency=stale")).unwrap(), Consistency::Stale);
        for (query, named) in [
            ("consistency=Stale", "'Stale'"),
            ("consistency", "not ''"),
            ("consistancy=stale", "'consistancy'"),
            ("x", "'x'"),
            ("consistency=stale&consistency=linearizable", "twice"),
        ] {
            let refusal = consistency(Some(query)).unwrap_err();
            assert!(refusal.line().contains(named), "{query}: {}", refusal.line());
        }
        assert!(no_parameters(Some("consistency=stale")).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_a_key(bytes in prop::collection::vec(any::<u8>(), 0..99)) {
            let path = percent_encode(&bytes, NON_ALPHANUMERIC).to_string();
            let decoded = decode(path.as_bytes());
            prop_assert_eq!(decoded.as_deref(), Some(&bytes[..]));
        }

        #[test]
        fn no_path_panics(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(decode(&bytes).is_none_or(|key| key.len() <= bytes.len()));
        }
    }
}
