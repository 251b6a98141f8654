//! Who the members are: IDs, peer URLs, and the identity of the cluster that a founding list makes. A leaf:
//! everyone may use it, it uses nobody.

use std::fmt;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// URLs that one member may have: what a peer takes in a header.
pub const URLS_MAX: usize = 16;

/// How much of a text that is no URL is shown to whoever wrote it, who may have written a million bytes.
const SHOWN_CHARS_MAX: usize = 64;

/// One member: its ID (never 0) and the URLs at which its peer port is reached, tried in turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub id: u64,
    pub urls: Vec<PeerUrl>,
}

/// An address of a peer port: `http://HOST:PORT`, lower case, with nothing behind the port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerUrl {
    host: String,
    port: u16,
}

impl PeerUrl {
    /// Parses and normalises a URL. The error is one line that says what is wrong with it and what would be right.
    pub fn parse(text: &str) -> Result<Self, InvalidPeerUrl> {
        let refuse = |why| Err(InvalidPeerUrl { url: text.chars().take(SHOWN_CHARS_MAX).collect(), why });
        let Some(authority) = text.strip_prefix("http://") else {
            return refuse("does not start with http://");
        };
        if authority.contains(['/', '?', '#']) {
            return refuse("has a path, a query or a trailing slash");
        }
        if authority.contains('@') {
            return refuse("has user information");
        }
        let Some((host, port)) = authority.rsplit_once(':') else {
            return refuse("has no port");
        };
        let host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            // One spelling for each address, so that a repeated one is seen.
            Some(address) => address.parse::<Ipv6Addr>().ok().map(|address| format!("[{address}]")),
            None => {
                let name = !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
                name.then(|| host.to_ascii_lowercase())
            }
        };
        let Some(host) = host else {
            return refuse("has no valid host (a name, an IPv4 address, or an IPv6 address in brackets)");
        };
        match port.parse() {
            Ok(number) if number != 0 && port.bytes().all(|b| b.is_ascii_digit()) => Ok(PeerUrl { host, port: number }),
            _ => refuse("has no valid port (1 to 65535)"),
        }
    }

    /// `HOST:PORT`, as it is dialled and bound.
    pub fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl fmt::Display for PeerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

impl TryFrom<String> for PeerUrl {
    type Error = InvalidPeerUrl;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        PeerUrl::parse(&text)
    }
}

impl From<PeerUrl> for String {
    fn from(url: PeerUrl) -> String {
        url.to_string()
    }
}

/// Why a text is no [`PeerUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} {why}; a peer URL looks like http://10.0.0.1:12379")]
pub struct InvalidPeerUrl {
    url: String,
    why: &'static str,
}

/// What a newcomer learns from a member that knows it: where it belongs, and who is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    pub cluster: u64,
    pub founders: Vec<Member>,
    pub members: Vec<Member>,
}

/// The identity of a cluster: a hash of its founding members in the order of their IDs, so that two clusters
/// founded on different lists never mix, however their addresses are reused later.
pub fn cluster_id(founders: &[Member]) -> u64 {
    let mut text = String::new();
    for member in founders {
        text.push_str(&member.id.to_string());
        for url in &member.urls {
            text.push('=');
            text.push_str(&url.to_string());
        }
        text.push('\n');
    }
    xxh3_64(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_normalised() {
        assert_eq!(PeerUrl::parse("http://LocalHost:0080").unwrap().to_string(), "http://localhost:80");
        assert_eq!(PeerUrl::parse("http://[0:0::1]:80").unwrap().authority(), "[::1]:80");
    }

    /// The trailing slash is raftexample's poison pill: accepted there, it panicked every node on every start.
    #[test]
    fn what_is_not_a_peer_url_is_refused_with_the_reason() {
        for (text, why) in [
            ("http://127.0.0.1:45279/", "trailing slash"),
            ("https://a:1", "http://"),
            ("a:1", "http://"),
            ("", "http://"),
            ("http://a", "no port"),
            ("http://a:0", "valid port"),
            ("http://a:65536", "valid port"),
            ("http://a:+80", "valid port"),
            ("http://a:8o", "valid port"),
            ("http://:1", "valid host"),
            ("http://a b:1", "valid host"),
            ("http://::1:80", "valid host"),
            ("http://u@a:1", "user information"),
            ("http://a:1?x", "query"),
        ] {
            let error = PeerUrl::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_refusal_shows_no_more_of_a_text_than_a_line_takes() {
        let error = PeerUrl::parse(&"x".repeat(1 << 20)).unwrap_err().to_string();
        assert!(error.len() < 200, "{} bytes", error.len());
    }

    #[test]
    fn another_list_is_another_cluster() {
        let list = |urls: &[&str]| -> Vec<Member> {
            (1..).zip(urls).map(|(id, url)| Member { id, urls: vec![PeerUrl::parse(url).unwrap()] }).collect()
        };
        assert_eq!(cluster_id(&list(&["http://a:1"])), cluster_id(&list(&["http://A:1"])));
        assert_ne!(cluster_id(&list(&["http://a:1"])), cluster_id(&list(&["http://a:2"])));
        assert_ne!(cluster_id(&list(&["http://a:1", "http://b:1"])), cluster_id(&list(&["http://b:1", "http://a:1"])));
    }
}
