//! Where a panic came from: tasks that panic are caught, and the oracle tells.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
    static CAUGHT: RefCell<bool> = const { RefCell::new(false) };
}

/// Keeps this thread's panics for [`last`] instead of printing them.
pub fn keep() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if CAUGHT.with_borrow(|caught| *caught) {
                LAST.with_borrow_mut(|last| *last = panic.to_string());
            } else {
                print(panic);
            }
        }));
    });
    CAUGHT.set(true);
}

/// Panics of this thread are printed again.
pub fn print() {
    CAUGHT.set(false);
}

pub fn last() -> String {
    LAST.take()
}
