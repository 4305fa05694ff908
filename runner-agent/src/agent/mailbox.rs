//! A queue that cannot fill up: what is said again takes the place of what it repeats. So whoever
//! tells never waits and never fails, however long the other side is busy.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

/// Has few kinds: a queue holds one of each at most.
pub(super) trait Kinds {
    /// Says whether nothing is lost when only this one is heard.
    fn replaces(&self, earlier: &Self) -> bool;
}

pub(super) struct Sender<T>(Arc<Queue<T>>);

pub(super) struct Receiver<T>(Arc<Queue<T>>);

struct Queue<T> {
    told: Mutex<VecDeque<T>>,
    news: Notify,
}

pub(super) fn mailbox<T: Kinds>() -> (Sender<T>, Receiver<T>) {
    let queue = Arc::new(Queue { told: Mutex::default(), news: Notify::new() });
    (Sender(queue.clone()), Receiver(queue))
}

impl<T: Kinds> Sender<T> {
    pub(super) fn send(&self, told: T) {
        let mut queue = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        queue.retain(|earlier| !told.replaces(earlier));
        queue.push_back(told);
        drop(queue);
        self.0.news.notify_one();
    }
}

impl<T: Kinds> Receiver<T> {
    /// Waits for what is told next, for ever when nobody is left to tell. Safe to abandon and call
    /// again.
    pub(super) async fn next(&mut self) -> T {
        loop {
            let told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match told {
                Some(told) => return told,
                None => self.0.news.notified().await,
            }
        }
    }

    /// Drops what was told so far.
    pub(super) fn forget(&mut self) {
        self.0.told.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Kinds for (char, u32) {
        fn replaces(&self, earlier: &Self) -> bool {
            self.0 == earlier.0
        }
    }

    #[tokio::test]
    async fn nothing_is_refused_and_the_newest_of_each_kind_is_heard_in_order() {
        let (to, mut told) = mailbox();
        for n in 0..1000 {
            to.send(('a', n));
        }
        to.send(('b', 1));
        to.send(('c', 1));
        to.send(('b', 2));
        for expect in [('a', 999), ('c', 1), ('b', 2)] {
            assert_eq!(told.next().await, expect);
        }
        let waiting = tokio::spawn(async move { told.next().await });
        tokio::task::yield_now().await;
        to.send(('d', 1));
        assert_eq!(waiting.await.unwrap(), ('d', 1));
    }
}
