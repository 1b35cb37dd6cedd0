-- Replace the limits of a key. ARGV: id, number of fields to delete, those, then field, value, ...
-- Returns 1, or 0 when there is no such key, or it was revoked.

local record = key('apikey', ARGV[1])
if call('HEXISTS', record, 'digest') == 0 then
  return 0
end
local num = tonumber(ARGV[2])
call('HDEL', record, unpack(ARGV, 3, 2 + num))
call('HSET', record, unpack(ARGV, 3 + num))
return 1
