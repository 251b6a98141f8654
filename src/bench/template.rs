//! The bytes of a request, made once, with a slot for the key: what a client sends is a copy with fifteen digits filled
//! in. Every protocol's requests are made here, HTTP's whole and gRPC's bodies.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::source::{Kind, Operation};
use super::{Consistency, Protocol};

/// `key-` and digits: a multiple of three, so that base64 of a key is whole.
const KEY_BYTES: usize = 15;
const DIGITS: usize = KEY_BYTES - PREFIX.len();
const PREFIX: &[u8] = b"key-";
const KEY_BASE64_BYTES: usize = KEY_BYTES / 3 * 4;

/// More keys have no number of so many digits.
pub const KEYS_MAX: u64 = 10_u64.pow(DIGITS as u32);

/// The requests of one client.
#[derive(Debug, Clone)]
pub struct Templates {
    write: Template,
    read: Template,
}

#[derive(Debug, Clone)]
struct Template {
    bytes: Vec<u8>,
    key_at: usize,
    base64: bool,
}

impl Templates {
    pub fn new(protocol: Protocol, consistency: Consistency, host: &str, value: &[u8]) -> Self {
        match protocol {
            Protocol::Http | Protocol::Plain => {
                let query = match consistency {
                    Consistency::Linearizable => "",
                    Consistency::Stale => "?consistency=stale",
                };
                let head = format!(" HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\n\r\n", value.len());
                let tail = format!("{query} HTTP/1.1\r\nHost: {host}\r\n\r\n");
                Templates {
                    write: Template::new(b"PUT /", &[head.as_bytes(), value].concat(), false),
                    read: Template::new(b"GET /", tail.as_bytes(), false),
                }
            }
            Protocol::EtcdJson => {
                let write_tail = format!("\",\"value\":\"{}\"}}", BASE64_STANDARD.encode(value));
                let read_tail = match consistency {
                    Consistency::Linearizable => "\"}",
                    Consistency::Stale => "\",\"serializable\":true}",
                };
                Templates { write: post("/v3/kv/put", host, &write_tail), read: post("/v3/kv/range", host, read_tail) }
            }
            Protocol::Etcd => {
                // etcd's rpc.proto. PutRequest: key 1, value 2; RangeRequest: key 1, serializable 7.
                let mut value_field = vec![0x12];
                put_varint(&mut value_field, value.len());
                value_field.extend_from_slice(value);
                let serializable: &[u8] = match consistency {
                    Consistency::Linearizable => &[],
                    Consistency::Stale => &[0x38, 1],
                };
                Templates { write: grpc(&value_field), read: grpc(serializable) }
            }
        }
    }

    /// Appends the request that does `operation`.
    pub fn append(&self, operation: &Operation, out: &mut Vec<u8>) {
        let template = match operation.kind {
            Kind::Write => &self.write,
            Kind::Read => &self.read,
        };
        let start = out.len() + template.key_at;
        out.extend_from_slice(&template.bytes);
        let mut key = [b'0'; KEY_BYTES];
        key[..PREFIX.len()].copy_from_slice(PREFIX);
        let mut rest = operation.key;
        for digit in key[PREFIX.len()..].iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        if template.base64 {
            let slot = &mut out[start..start + KEY_BASE64_BYTES];
            BASE64_STANDARD.encode_slice(key, slot).expect("a slot of the key's length in base64");
        } else {
            out[start..start + KEY_BYTES].copy_from_slice(&key);
        }
    }
}

impl Template {
    fn new(head: &[u8], tail: &[u8], base64: bool) -> Self {
        let slot = vec![b'.'; if base64 { KEY_BASE64_BYTES } else { KEY_BYTES }];
        Template { bytes: [head, &slot, tail].concat(), key_at: head.len(), base64 }
    }
}

/// A request to etcd's gateway, whose JSON holds keys and values in base64.
fn post(path: &str, host: &str, tail: &str) -> Template {
    let open = "{\"key\":\"";
    let length = open.len() + KEY_BASE64_BYTES + tail.len();
    let head = format!("POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n{open}");
    Template::new(head.as_bytes(), tail.as_bytes(), true)
}

/// A message with a key as field 1, behind gRPC's prefix: not compressed, and its length.
fn grpc(fields_behind: &[u8]) -> Template {
    let length = 2 + KEY_BYTES + fields_behind.len();
    let mut head = vec![0];
    head.extend_from_slice(&u32::try_from(length).expect("values are bounded").to_be_bytes());
    head.extend_from_slice(&[0x0a, KEY_BYTES as u8]);
    Template::new(&head, fields_behind, false)
}

fn put_varint(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn request(protocol: Protocol, consistency: Consistency, kind: Kind, value: &[u8]) -> Vec<u8> {
        let templates = Templates::new(protocol, consistency, "h:1", value);
        let mut out = b"before".to_vec();
        templates.append(&Operation { kind, key: 1234, intended: Instant::now() }, &mut out);
        out.split_off(6)
    }

    #[test]
    fn http_requests_are_whole() {
        let write = request(Protocol::Http, Consistency::Stale, Kind::Write, b"abc");
        assert_eq!(write, b"PUT /key-00000001234 HTTP/1.1\r\nHost: h:1\r\nContent-Length: 3\r\n\r\nabc");
        let read = request(Protocol::Http, Consistency::Stale, Kind::Read, b"abc");
        assert_eq!(read, b"GET /key-00000001234?consistency=stale HTTP/1.1\r\nHost: h:1\r\n\r\n");
        let read = request(Protocol::Plain, Consistency::Linearizable, Kind::Read, b"abc");
        assert_eq!(read, b"GET /key-00000001234 HTTP/1.1\r\nHost: h:1\r\n\r\n");
    }

    #[test]
    fn the_gateway_gets_json_of_the_length_that_it_is_told() {
        for (kind, consistency, expected) in [
            (Kind::Write, Consistency::Linearizable, r#"{"key":"a2V5LTAwMDAwMDAxMjM0","value":"YWJj"}"#),
            (Kind::Read, Consistency::Linearizable, r#"{"key":"a2V5LTAwMDAwMDAxMjM0"}"#),
            (Kind::Read, Consistency::Stale, r#"{"key":"a2V5LTAwMDAwMDAxMjM0","serializable":true}"#),
        ] {
            let text = String::from_utf8(request(Protocol::EtcdJson, consistency, kind, b"abc")).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert_eq!(body, expected);
            assert!(head.ends_with(&format!("Content-Length: {}", body.len())), "{head}");
            assert_eq!(BASE64_STANDARD.decode("a2V5LTAwMDAwMDAxMjM0").unwrap(), b"key-00000001234");
        }
    }

    #[test]
    fn grpc_messages_are_those_of_the_proto() {
        let write = request(Protocol::Etcd, Consistency::Linearizable, Kind::Write, &[b'v'; 300]);
        // 17 bytes of key field, then tag, two bytes of length and the value.
        assert_eq!(write[..7], [0, 0, 0, 1, 64, 0x0a, 15]);
        assert_eq!(&write[7..22], b"key-00000001234");
        assert_eq!((&write[22..25], write.len()), (&[0x12, 0xac, 0x02][..], 5 + 320));
        let read = request(Protocol::Etcd, Consistency::Stale, Kind::Read, b"");
        assert_eq!((&read[..7], &read[22..]), (&[0, 0, 0, 0, 19, 0x0a, 15][..], &[0x38, 1][..]));
    }
}
