//! What an answer over HTTP says about an operation: the README's table of statuses, once for all tests that record.

use super::{Call, Outcome};

/// `answer`: status and body of what came at the time `at`; None where the connection broke or never was.
pub fn outcome(call: &Call, answer: Option<(u16, &[u8])>, at: u64) -> Outcome {
    let Some((status, body)) = answer else {
        return Outcome::Unknown;
    };
    match (call, status) {
        (Call::Get, 200) => Outcome::Done { at, read: Some(body.to_vec()) },
        (Call::Get, 404) => Outcome::Done { at, read: None },
        (Call::Get, _) => Outcome::Unknown,
        (Call::Put(_) | Call::Delete, 204) => Outcome::Done { at, read: None },
        (Call::Put(_) | Call::Delete, 400 | 405 | 409 | 413 | 414 | 429 | 431 | 501 | 503 | 507) => {
            // The promise is the status; the line must not say otherwise.
            let line = String::from_utf8_lossy(body);
            assert!(!line.contains("outcome unknown"), "{status} means not applied, but: {line}");
            Outcome::NotApplied
        }
        // 504, and whatever promises nothing.
        (Call::Put(_) | Call::Delete, _) => Outcome::Unknown,
    }
}
