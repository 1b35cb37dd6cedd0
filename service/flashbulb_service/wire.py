"""The version of what APIs and workers send one another through the queue.

Two versions of the service may share one queue: this one and the one before. Every message, and every job in the
queue, says the oldest version that understands it, where that is not the first one. Hence:

* A field that is added has a default, which never changes, and is left out of the JSON while it has it: what the
  version before could have said is still said in its words.
* What only this version understands says so (`wire=WIRE`). Workers leave such jobs to those who do, and APIs
  answer 503: another one may know more.
* Fields that nobody here knows are ignored. Version 1 refuses them.

Raise WIRE with the first message that the released version would misread, and write down here what it is.

version  what is new
1        everything before there was a number
2        unknown fields are ignored; messages and jobs carry a version; videos
"""

WIRE = 2
