//! How writes lie in a log entry. What is proposed at once shares entries: raft, the log and the network take the same
//! time for an entry of many small writes as for an entry of one.
//!
//! ```text
//!             context                                   data
//! one write   its RequestId                             its command
//! several     for each its RequestId, length u32 LE     their commands, one behind the other
//! ```

use bytes::{BufMut, Bytes, BytesMut};

use super::{COMMAND_BYTES_MAX, RequestId};

/// The longest command that shares an entry, in bytes. A longer one has its own, so that the service may keep a part of it
/// without keeping others in memory.
pub const SHARED_COMMAND_BYTES_MAX: usize = 4 << 10;

/// Of the commands that share an entry: it is sent in one message.
const SHARED_BYTES_MAX: usize = 64 << 10;

/// The most writes that share an entry: the service applies them in one go.
const SHARED_WRITES_MAX: usize = 512;

/// Of one write in a shared entry's context.
const NAME_BYTES: usize = RequestId::BYTES + 4;

/// The writes of one entry, in order; at least one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writes {
    context: Bytes,
    data: Bytes,
}

impl Writes {
    /// The only write in its entry.
    pub fn one(request: RequestId, command: Bytes) -> Self {
        Writes { context: Bytes::copy_from_slice(&request.to_bytes()), data: command }
    }

    /// As few entries as they fit in, in order.
    pub fn pack(mut writes: &[(RequestId, Bytes)]) -> Vec<Writes> {
        let mut packed = Vec::new();
        while let Some((first, _)) = writes.split_first() {
            let (entry, behind) = writes.split_at(sharing(writes));
            packed.push(if entry.len() == 1 { Writes::one(first.0, first.1.clone()) } else { Writes::shared(entry) });
            writes = behind;
        }
        packed
    }

    fn shared(writes: &[(RequestId, Bytes)]) -> Self {
        let mut context = BytesMut::with_capacity(writes.len() * NAME_BYTES);
        let mut data = BytesMut::with_capacity(writes.iter().map(|(_, command)| command.len()).sum());
        for (request, command) in writes {
            context.put_slice(&request.to_bytes());
            context.put_u32_le(command.len() as u32);
            data.put_slice(command);
        }
        Writes { context: context.freeze(), data: data.freeze() }
    }

    /// The writes of an entry with this context and these data; `None` where [`Writes::pack`] makes none such.
    pub fn read(context: Bytes, data: Bytes) -> Option<Self> {
        let is_one = context.len() == RequestId::BYTES && data.len() <= COMMAND_BYTES_MAX;
        let writes = Writes { context, data };
        (is_one || writes.is_shared()).then_some(writes)
    }

    fn is_shared(&self) -> bool {
        let (names, rest) = self.context.as_chunks();
        let lens = || names.iter().map(|name| named(name).1);
        rest.is_empty()
            && (2..=SHARED_WRITES_MAX).contains(&names.len())
            && lens().all(|len| len <= SHARED_COMMAND_BYTES_MAX)
            && lens().sum::<usize>() == self.data.len()
            && self.data.len() <= SHARED_BYTES_MAX
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        Writes::count_in(&self.context)
    }

    /// How many writes an entry with this context holds. An entry of another kind counts for one.
    pub fn count_in(context: &[u8]) -> usize {
        (context.len() / NAME_BYTES).max(1)
    }

    /// The context of their entry.
    pub fn names(&self) -> &Bytes {
        &self.context
    }

    /// Each write's name and command.
    pub fn iter(&self) -> impl Iterator<Item = (RequestId, &[u8])> {
        let one = RequestId::from_bytes(&self.context).map(|request| (request, self.data.len()));
        // Of a lone write the context is shorter than a chunk.
        let (names, _) = self.context.as_chunks();
        let mut rest = &self.data[..];
        one.into_iter().chain(names.iter().map(named)).map(move |(request, len)| {
            let (command, behind) = rest.split_at(len);
            rest = behind;
            (request, command)
        })
    }

    /// All commands, one behind the other, in the memory that the slices of [`Writes::iter`] lie in.
    pub fn commands(&self) -> &Bytes {
        &self.data
    }

    /// The context and the data of their entry.
    pub fn into_entry(self) -> (Bytes, Bytes) {
        (self.context, self.data)
    }
}

/// How many of these writes go into the next entry.
fn sharing(writes: &[(RequestId, Bytes)]) -> usize {
    let mut bytes = 0;
    let shares = |(_, command): &&(RequestId, Bytes)| {
        bytes += command.len();
        command.len() <= SHARED_COMMAND_BYTES_MAX && bytes <= SHARED_BYTES_MAX
    };
    writes.iter().take(SHARED_WRITES_MAX).take_while(shares).count().max(1)
}

fn named(name: &[u8; NAME_BYTES]) -> (RequestId, usize) {
    let (request, len) = name.split_first_chunk::<{ RequestId::BYTES }>().expect("a name begins with one");
    let len: [u8; 4] = len.try_into().expect("and ends with a length");
    (RequestId::from_array(request), u32::from_le_bytes(len) as usize)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(counter: u64) -> RequestId {
        RequestId { node: 1, boot: 2, counter }
    }

    fn writes(lens: &[usize]) -> Vec<(RequestId, Bytes)> {
        (1..).zip(lens).map(|(counter, len)| (request(counter), vec![counter as u8; *len].into())).collect()
    }

    fn counts(lens: &[usize]) -> Vec<usize> {
        Writes::pack(&writes(lens)).iter().map(Writes::count).collect()
    }

    /// These bytes are in logs on disks: they may never change.
    #[test]
    fn golden_bytes() {
        let [entry] = &Writes::pack(&[(request(3), Bytes::from_static(b"one"))])[..] else { panic!("one entry") };
        let name = |counter: u8| [&[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, counter][..], &[0; 7]].concat();
        assert_eq!(entry.clone().into_entry(), (name(3).into(), Bytes::from_static(b"one")));
        let two = [(request(3), Bytes::from_static(b"one")), (request(4), Bytes::from_static(b"more"))];
        let [entry] = &Writes::pack(&two)[..] else { panic!("one entry") };
        let names = [name(3), vec![3, 0, 0, 0], name(4), vec![4, 0, 0, 0]].concat();
        assert_eq!(entry.clone().into_entry(), (names.into(), Bytes::from_static(b"onemore")));
    }

    #[test]
    fn many_small_ones_share_and_a_large_one_is_alone() {
        assert!(counts(&[]).is_empty());
        assert_eq!(counts(&[5; 30]), [30]);
        assert_eq!(counts(&[0, 0]), [2]);
        assert_eq!(counts(&[10, 20, SHARED_COMMAND_BYTES_MAX + 1, 30, 40]), [2, 1, 2]);
        assert_eq!(counts(&[SHARED_COMMAND_BYTES_MAX; 17]), [16, 1]);
        assert_eq!(counts(&[1; 2 * SHARED_WRITES_MAX + 1]), [SHARED_WRITES_MAX, SHARED_WRITES_MAX, 1]);
        assert_eq!(counts(&[COMMAND_BYTES_MAX; 2]), [1, 1]);
    }

    #[test]
    fn what_no_pack_makes_is_not_read() {
        let (context, data) = Writes::pack(&writes(&[3, 4])).remove(0).into_entry();
        let read = |context: &[u8], data: &[u8]| Writes::read(context.to_vec().into(), data.to_vec().into());
        assert!(read(&context, &data).is_some());
        assert_eq!(read(&context, &data[1..]), None, "data too short");
        assert_eq!(read(&context, &[&data[..], b"1"].concat()), None, "data too long");
        assert_eq!(read(&context[1..], &data), None, "no whole name");
        assert_eq!(read(&context[..NAME_BYTES], &data[..3]), None, "one alone has no length");
        assert_eq!(read(b"", &data), None, "no name");
        let large = vec![0; COMMAND_BYTES_MAX + 1];
        assert_eq!(read(&context[..RequestId::BYTES], &large), None, "a command too long");
        let mut lens = context.to_vec();
        lens[RequestId::BYTES..NAME_BYTES].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(read(&lens, &data), None, "a length of all there is");
    }

    proptest! {
        #[test]
        fn what_is_packed_is_read(lens in prop::collection::vec(prop_oneof![9 => 0..200usize, 1 => 0..9000usize], 0..80)) {
            let writes = writes(&lens);
            let packed = Writes::pack(&writes);
            let read: Vec<_> = packed.iter().flat_map(|entry| {
                let (context, data) = entry.clone().into_entry();
                assert_eq!(Writes::read(context, data).as_ref(), Some(entry));
                assert_eq!(entry.iter().count(), entry.count());
                entry.iter().map(|(request, command)| (request, entry.commands().slice_ref(command)))
            }).collect();
            prop_assert_eq!(read, writes);
        }

        #[test]
        fn no_bytes_panic(context in prop::collection::vec(0..5u8, 0..90), data in prop::collection::vec(any::<u8>(), 0..9)) {
            if let Some(writes) = Writes::read(context.into(), data.into()) {
                prop_assert_eq!(writes.iter().count(), writes.count());
            }
        }
    }
}
