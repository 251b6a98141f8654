//! What must hold of the targets and bodies of requests, whatever bytes they are. Called by `crate::fuzzing`; not in any
//! binary that ships.

use hyper::Uri;
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};

use super::raftexample::{addresses, member_id};
use super::reply::Refusal;
use super::target::{consistency, key, no_parameters, place};
use crate::cluster::{PeerUrl, URLS_MAX};
use crate::command::KEY_BYTES_MAX;

/// The longest refusal. It names what a client sent, which may be long.
const REFUSAL_BYTES_MAX: usize = 1024;

/// Any bytes as a request target: a key has one meaning however it is written, and a refusal is one line.
pub fn target(bytes: &[u8]) {
    let Ok(uri) = Uri::try_from(bytes) else { return };
    match key(&uri) {
        Ok(found) => {
            assert!((1..=KEY_BYTES_MAX).contains(&found.len()));
            let escaped: Uri = format!("/{}", percent_encode(&found, NON_ALPHANUMERIC)).parse().expect("a path");
            let again = key(&escaped).expect("an escaped key is one");
            assert_eq!((&again, place(&again)), (&found, place(&found)));
            match member_id(&found, "usage") {
                Ok(id) => assert!(id != 0 && found.iter().all(u8::is_ascii_digit)),
                Err(refusal) => one_line(&refusal),
            }
        }
        Err(refusal) => one_line(&refusal),
    }
    let query = uri.query();
    match (consistency(query), no_parameters(query)) {
        (Ok(_), Err(refusal)) | (Err(refusal), Ok(())) => one_line(&refusal),
        (Err(refusal), Err(other)) => {
            one_line(&refusal);
            one_line(&other);
        }
        (Ok(_), Ok(())) => assert!(query.is_none_or(|query| query.bytes().all(|byte| byte == b'&'))),
    }
}

/// Any bytes as the body of a POST: addresses that every member can read, and that mean the same when they are written.
pub fn addresses_body(bytes: &[u8]) {
    let urls = match addresses(bytes) {
        Ok(urls) => urls,
        Err(refusal) => return one_line(&refusal),
    };
    assert!((1..=URLS_MAX).contains(&urls.len()), "{} URLs of one member", urls.len());
    let text = urls.iter().map(PeerUrl::to_string).collect::<Vec<_>>().join("+");
    assert_eq!(addresses(text.as_bytes()).ok(), Some(urls));
}

fn one_line(refusal: &Refusal) {
    let line = refusal.line();
    let text = line.strip_suffix('\n').expect("a line ends");
    assert!(line.len() <= REFUSAL_BYTES_MAX, "a refusal of {} bytes", line.len());
    assert!(!text.is_empty() && !text.contains(char::is_control), "{line:?}");
}

/// Inputs to begin with: of [`target`], [`addresses_body`].
#[cfg(test)]
pub fn seeds() -> [Vec<Vec<u8>>; 2] {
    let targets = [
        "/key",
        "/a/../b//c",
        "/%ff%00%2Fx",
        "/%",
        "/metrics",
        "/%61pi/v1",
        "/4",
        "/0",
        "http://host/key",
        "*",
        "/key?consistency=stale",
        "/key?consistency=linearizable&consistency=stale",
        "/key?x=%0a",
        "/",
    ];
    let many: Vec<String> = (1..=URLS_MAX + 1).map(|port| format!("http://a:{port}")).collect();
    let long = format!("http://{}", "\u{1f980}".repeat(200));
    let bodies = ["http://a:1", "http://[0:0::1]:80+http://B:2", "http://a:1+http://a:1", &many.join("+"), &long];
    [targets.map(Vec::from).into(), bodies.map(Vec::from).into()]
}
