#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| raftkv::fuzzing::propose_body(bytes));
