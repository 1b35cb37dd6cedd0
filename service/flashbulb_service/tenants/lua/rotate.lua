-- Give a key a new secret; the one before stays good for a while. ARGV: now, id, new digest, grace.
-- Returns 1, or 0 when there is no such key, or it was revoked.

local now = now_ms(ARGV[1])
local record = key('apikey', ARGV[2])
local digest = call('HGET', record, 'digest')
if not digest then
  return 0
end
if digest == ARGV[3] then
  return 1 -- our own earlier call, whose answer was lost on the way
end
call('HSET', record, 'digest', ARGV[3], 'old_digest', digest, 'old_until', now + tonumber(ARGV[4]), 'rotated', now)
return 1
